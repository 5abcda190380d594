"""What heads are asked for, and what a model does without some of them."""
