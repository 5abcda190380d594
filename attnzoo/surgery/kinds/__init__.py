"""The kinds of conversion, each an object: what recipes call it, how it is prepared and made again, what is cached.

To add one: a class in a file here, and its place in ``KINDS``; the first that takes a variant converts to it.
"""

from attnzoo.surgery.kinds.known import KINDS, REPLACING, kind_for, kind_of

__all__ = ["KINDS", "REPLACING", "kind_for", "kind_of"]
