"""The Triton kernels, and the only modules that import triton. Nothing here is imported before a call asks for it."""
