"""The operation beside its peers on a CPU: ``python -m bench.cpu``."""
