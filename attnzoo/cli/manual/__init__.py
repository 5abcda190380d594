"""What the command line says about itself: help, and what is wrong with a call."""
