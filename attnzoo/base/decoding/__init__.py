"""Decoding: what is kept from step to step, and the step of one row."""
