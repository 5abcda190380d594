"""LongHeads on a pretrained model far beyond the length it was trained at: ``python -m bench.longheads``."""
