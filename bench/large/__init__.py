"""Conversions of a checkpoint of 1.5 billion parameters, block by block: memory and time of a process."""
