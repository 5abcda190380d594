"""Run where the wheel is installed with torch, einops and numpy alone: every variant trains and decodes.

Copied out of the source and run by the command of this folder; it is no test of pytest's.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Trains and decodes."""
    import torch

    import attnzoo
    import attnzoo_kernels

    for package in (attnzoo, attnzoo_kernels):
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not of {sys.prefix}"
    for absent in ("transformers", "typer", "rich", "matplotlib", "pytest", "hatchling"):
        assert importlib.util.find_spec(absent) is None, f"{absent} is there, and the core does not ask for it"

    torch.manual_seed(0)
    for name in attnzoo.list_variants():
        layer = attnzoo.create(name, dim=32, num_heads=2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        x = torch.randn(2, 40, 32)
        losses = []
        for _ in range(8):
            loss = (layer(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"{name}: {losses}"
        with torch.no_grad():
            cache = layer.eval().new_cache(batch=2, max_length=40)
            parts = [layer(part, cache=cache) for part in x.split([30, *[1] * 10], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-5, rtol=1e-4)

    # The command line is an extra, and its absence is one line that says how to get it.
    done = subprocess.run([sys.executable, "-m", "attnzoo", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "pip install 'attnzoo[cli,hf]'" in done.stderr, done.stderr
    print(f"{len(attnzoo.list_variants())} variants train and decode")


if __name__ == "__main__":
    main()
