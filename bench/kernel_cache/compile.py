"""Compiles what was recorded, with a triton that need not stand beside torch.

    python bench/kernel_cache/compile.py REQUESTS.pickle CACHE CAPABILITY SHARE SHARES

The last process of several, and one alone, prints what the cache is made with.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

VARIABLES = {"TRITON_STORE_BINARY_ONLY": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
"""Binaries are all that a launch needs. The other is in every kernel's key, and set by ``bench.gpu_first`` too."""


def main(given: list[str]) -> int:
    """Compiles one share of the requests; 1 where something does not compile."""
    requests_path, cache, capability, share, shares = given
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    os.environ.update(VARIABLES, TRITON_CACHE_DIR=cache)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    from bench.kernel_cache import fits

    kernels = fits.kernels()
    requests = pickle.loads(Path(requests_path).read_bytes())
    target = GPUTarget("cuda", int(capability), 32)
    failed = 0
    for name, signature, constants, attributes, kept in requests[int(share) :: int(shares)]:
        options = make_backend(target).parse_options(kept)
        source = ASTSource(kernels[name], signature, constants, attributes)
        try:
            triton.compile(source, target=target, options=options.__dict__)
        except Exception as error:  # the others are worth their time; the machine will say it again
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr, flush=True)
    print(json.dumps({"failed": failed, "made with": fits.made_with(int(capability))}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    sys.exit(main(sys.argv[1:]))
