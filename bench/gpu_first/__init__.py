"""A first contact with a GPU, against the clock: ``python -m bench.gpu_first``."""
