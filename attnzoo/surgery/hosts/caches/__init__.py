"""Layers of the host's cache: its own keys and values in buffers that grow, and what replacements remember."""
