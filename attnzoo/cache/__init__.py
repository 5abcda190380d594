"""What a layer remembers between calls."""
