"""What variants share that choose key blocks by scores."""
