"""Which variants take a seat in a pretrained model, and how: one line here for each.

A variant that computes or remembers otherwise than its host is seated: :func:`attnzoo.surgery.convert` builds its layer
with the site's sizes, rotation and scale, puts the host's own projections into it, and places it as a
:class:`~attnzoo.surgery.replacements.replacement.LayerSeat`. What is particular to a variant stands in a
:class:`~attnzoo.surgery.replacements.spec.SeatSpec`: the options that surgery starts from, the first values of weights
that hosts do not have, the warning that a configuration deserves, and what happens to the model's input.

To add one: a file ``seats/<variant>.py`` with a ``SPEC``, or only ``SeatSpec()`` where nothing is particular, and a
line in ``SEATS``. The layer needs nothing else: ``new_cache`` and ``attend`` are all that a seat calls. A cache that
holds more than streams of tokens extends ``grow``, ``crop`` (which may be given a length for each item) and
``reorder``.
"""

from __future__ import annotations

from attnzoo.surgery.replacements import landmark, longheads, moh, rcmha
from attnzoo.surgery.replacements.spec import SeatSpec

SEATS: dict[str, SeatSpec] = {
    "landmark": landmark.SPEC,
    "longheads": longheads.SPEC,
    "mha": SeatSpec(),
    "moh": moh.SPEC,
    "rcmha": rcmha.SPEC,
}
"""The variants that can be seated. To ``convert``, "mha" is a way of reading; its seat is the certificate of all."""
