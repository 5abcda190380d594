"""The kernels beside their peers on a GPU: ``python -m bench.gpu``."""
