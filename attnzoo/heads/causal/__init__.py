"""What heads do to a model's output: what is caught of them, taken away, or put in their place."""
