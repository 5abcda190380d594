"""Edits of heads that stay: kept with blocks or folded into weights as a conversion, and told in plain data."""
