"""Attention over rows that a policy keeps in pages."""
