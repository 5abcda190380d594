"""Independent truth about edits of single heads: a decoder in plain loops, edits of it, and what heads do to it."""

from __future__ import annotations
