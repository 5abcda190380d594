"""What commands do that compute."""
