"""Families of hosts, one a file, and the list of them."""
