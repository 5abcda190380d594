"""What is trained of heads while the model stays as it is."""
