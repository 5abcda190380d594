"""Scores of heads: by their attention on random tokens, by what they copy, and by their weights alone."""

from __future__ import annotations

from attnzoo.heads.scores.named import duplicate, echo, induction, previous, retrieval

__all__ = ["duplicate", "echo", "induction", "previous", "retrieval"]
