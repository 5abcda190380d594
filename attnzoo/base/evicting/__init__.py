"""Layers whose caches evict: attention over what is held and over what a call brings."""
