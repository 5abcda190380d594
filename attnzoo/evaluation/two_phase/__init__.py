"""Two-phase evaluation of KV-cache policies: a context, what is let go of, and then the continuation."""
