"""Caches that hold no more than later rows can read."""
