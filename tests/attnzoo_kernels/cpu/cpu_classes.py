"""Other classes of CPU than this one, to answer for: what only one of them runs is tested on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attnzoo_kernels.runtime import processor
from attnzoo_kernels.runtime.processor import Processor

PROCESSORS = {
    "avx2": Processor("avx2", multiplies_bf16=False),
    "avx512": Processor("avx512", multiplies_bf16=False),
    "avx512 with bf16": Processor("avx512", multiplies_bf16=True),
    "amx": Processor("amx", multiplies_bf16=True),
    "other": Processor("other", multiplies_bf16=False),
}


@contextmanager
def answering(cpu: str) -> Iterator[None]:
    """Answers for one of :data:`PROCESSORS`, in every thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "_detected", lambda: PROCESSORS[cpu])
        yield
