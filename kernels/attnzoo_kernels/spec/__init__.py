"""What a call is, as plain data."""
