"""Rows that choose key blocks for themselves, computed key block by key block: each is read once for all its rows."""
