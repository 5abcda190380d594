"""Loads converted hosts and keeps what they say: ``python -m tests.attnzoo.surgery.families.stored FOLDER``.

The folder has a folder for each, ``host-NUMBER``, beside ``hosts.json``, which says which host each is; what they say
is written to ``said.safetensors``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from attnzoo import surgery
from tests.attnzoo.surgery.families.hosts import HOSTS, in_single, said

TOKENS = 9


def said_by_loaded(folder: Path, name: str) -> Tensor:
    """What a host says that was saved."""
    given = HOSTS[name].inputs(1, TOKENS)
    with torch.no_grad():
        if not HOSTS[name].of_transformers:
            return said(surgery.load(folder, base=HOSTS[name].make())[0], given)
        # What is loaded computes norms and rotation in fp32, as the host does.
        return said(surgery.load(folder)[0].float(), in_single(given))


def main(folder: Path) -> None:
    """Loads all, one after the other."""
    found = {}
    for key, name in json.loads((folder / "hosts.json").read_text(encoding="utf-8")).items():
        found[key] = said_by_loaded(folder / key, name).contiguous()
    save_file(found, folder / "said.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
