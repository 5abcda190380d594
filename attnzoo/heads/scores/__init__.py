"""Scores of heads: by their attention on random tokens, by what they copy, and by their weights alone."""
