"""The slots that one row reads where each head reads blocks of its own, the row's own block the last.

Letters: G KV heads, N blocks up to the row's own, w tokens of a block, n slots that a head reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import Slots


def slots_of_blocks(kept: Tensor, size: int, device: torch.device) -> Slots:
    """The slots of blocks of so many tokens that heads read, bool ``[G, N]`` on the CPU; all read the last block.

    Heads with fewer blocks repeat their first slot in front, so that the last slots are the last block's in any case.
    """
    if bool((kept == kept[:1]).all()):
        return Slots.of_runs(
            [(block * size, (block + 1) * size) for block in kept[0].nonzero().flatten().tolist()], device
        )
    within = torch.arange(size, device="cpu")
    each = [(head.nonzero() * size + within).flatten() for head in kept]
    most = max(len(slots) for slots in each)
    index = torch.stack([torch.cat((slots[:1].expand(most - len(slots)), slots)) for slots in each])
    shown = None
    if any(len(slots) < most for slots in each):
        missing = torch.tensor([most - len(slots) for slots in each], device="cpu").unsqueeze(1)
        shown = (torch.arange(most, device="cpu") >= missing).to(device)
    return Slots(None, index.to(device), shown)


def ending_at(slots: Slots, held: int, size: int) -> Slots:
    """The slots of whole blocks without those that are not held yet, behind the last of ``held`` tokens."""
    behind = -held % size
    if slots.runs is not None:
        return Slots((*slots.runs[:-1], (slots.runs[-1][0], held)))
    if slots.index is None or not behind:
        return slots
    return Slots(None, slots.index[:, :-behind], None if slots.shown is None else slots.shown[:, :-behind])
