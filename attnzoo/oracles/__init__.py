"""Independent truth: what each variant computes, written from its formulas as plain loops.

An oracle knows torch and nothing else of this package, takes the weights of a layer as a state dict, computes one query
of one head at a time, and is differentiable in any precision. It is slow on purpose.
"""

from __future__ import annotations
