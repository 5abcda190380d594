"""Measuring: models on text, conversions side by side, and what layers cost."""
