"""The slots that one row reads where each head reads near blocks and some far ones, the row's own block the last.

Letters: G KV heads, N blocks up to the row's own, n slots of far blocks that a head reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import Slots


def slots_of_blocks(kept: Tensor, near: int, size: int, device: torch.device) -> Slots:
    """The slots of blocks of so many tokens: near ones lie together and are one run, far ones are listed by head.

    Args:
        kept: Which blocks heads read, bool ``[G, N]`` on the CPU; all read the near ones, the last N - ``near``.
        near: The first of the near blocks.
        size: Tokens in a block.
        device: Where the lists lie.
    """
    if bool((kept == kept[:1]).all()):
        kept = kept[:1]
        blocks = kept[0].nonzero().flatten().tolist()
        slots = Slots.of_runs([(block * size, (block + 1) * size) for block in blocks], device)
        if slots.runs is not None:
            return slots
    within = torch.arange(size, device="cpu")
    far = [(head[:near].nonzero() * size + within).flatten() for head in kept]
    most = max(len(slots) for slots in far)
    # A head with fewer repeats a near slot, which it reads in any case.
    first = near * size
    index = torch.stack([torch.nn.functional.pad(slots, (0, most - len(slots)), value=first) for slots in far])
    shown = None
    if any(len(slots) < most for slots in far):
        count = torch.tensor([len(slots) for slots in far], device="cpu").unsqueeze(1)
        shown = (torch.arange(most, device="cpu") < count).to(device)
    return Slots(((first, kept.shape[1] * size),), index.to(device), shown)


def ending_at(slots: Slots, held: int) -> Slots:
    """The slots of whole blocks without those of the last one that lie behind the last of ``held`` tokens."""
    if slots.runs is None:
        raise AssertionError("the row's own block is the end of a run")
    return Slots((*slots.runs[:-1], (slots.runs[-1][0], held)), slots.index, slots.shown)
