"""Landmark attention: the layer, its tokens, and choosing blocks by their landmarks."""
