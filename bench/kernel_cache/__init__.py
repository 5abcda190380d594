"""Kernels compiled where there is no GPU, for a GPU machine to find in its cache: ``python -m bench.kernel_cache``.

Triton finds a compiled kernel by a key of its own code, the kernel's source, what the kernel is specialised for, the
target, and a few variables of the environment; nothing in it says whether a device was there. So calls are *recorded*
through the launcher, with a driver that knows its target alone (``record``); compiled, by a Python that needs triton
and no torch (``compile``); and unpacked, with paths made those of the new place (``unpack``). Triton's own code differs
with the version of Python that its package is made for: ``fits`` says whether the archive's is that of a machine.
"""
