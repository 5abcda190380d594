"""Edits of heads: what they say, where a head's output goes, and what puts them there."""
