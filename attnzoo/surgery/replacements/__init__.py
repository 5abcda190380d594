"""Which variants replace blocks of a pretrained model, and how: one line here for each.

A variant that computes or remembers otherwise than its host replaces blocks: :func:`attnzoo.surgery.convert` builds its
layer with the site's sizes, rotation and scale, puts the host's own projections into it, and places it as a
:class:`~attnzoo.surgery.replacements.replacement.Replacement`. What is particular to a variant stands in a
:class:`~attnzoo.surgery.replacements.spec.ReplacementSpec`: the options that surgery starts from, the first values of
weights that hosts do not have, the warning that a configuration deserves, and what happens to the model's input.

To add one: a file ``replacements/<variant>.py`` with a ``SPEC``, or only ``ReplacementSpec()`` where nothing is
particular, and a line in ``REPLACEMENTS``. The layer needs nothing else: ``new_cache`` and ``attend`` are all that a
replacement calls. A cache that holds more than streams of tokens extends ``grow``, ``crop`` (which may be given a
length for each item) and ``reorder``.
"""

from __future__ import annotations

from attnzoo.surgery.replacements import landmark, longheads, moh, rcmha
from attnzoo.surgery.replacements.spec import ReplacementSpec

REPLACEMENTS: dict[str, ReplacementSpec] = {
    "landmark": landmark.SPEC,
    "longheads": longheads.SPEC,
    "mha": ReplacementSpec(),
    "moh": moh.SPEC,
    "rcmha": rcmha.SPEC,
}
"""Variants that replace blocks. To ``convert``, "mha" changes what is read; its replacement certifies all others."""
