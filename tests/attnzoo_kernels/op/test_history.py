"""Whatever happened before, a call gives what it gives on fresh objects in a fresh process."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from attnzoo_kernels.runtime import workspace
from tests.attnzoo_kernels.op.test_agreement import run, seeds_of
from tests.attnzoo_kernels.op.test_poison import poison_scratch
from tests.attnzoo_kernels.op.test_torture import assert_bitwise
from tests.attnzoo_kernels.oracle import Answer, Problem
from tests.strategies import Numbers, layout_of

LENGTHS = (8, 24, 33)


def call_of(seed: int, length: int, dtype: torch.dtype, window: int | None) -> Problem:
    """The layout and the tensors hang on the seed and the length alone."""
    n = Numbers.of(seed)
    keep = n.chance(0.6, 1, 2, -(-length // 8), -(-length // 6))
    shapes = ((4, length, 5), (2, length, 5), (2, length, 3))
    return Problem(*(n.normal(1, *shape).to(dtype) for shape in shapes), keep, 8, 6, window=window)


class History(RuleBasedStateMachine):
    """Layouts are made, used under several rules, copied and dropped, while memory and threads change under them."""

    layouts = Bundle("layouts")

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[int, int], BlockLayout] = {}

    @rule(target=layouts, seed=st.integers(0, 2), length=st.sampled_from(LENGTHS))
    def make(self, seed: int, length: int) -> tuple[int, int]:
        self.known[seed, length] = layout_of(call_of(seed, length, torch.float32, None))
        return seed, length

    @rule(which=layouts, way=st.sampled_from(["deepcopy", "pickle", "compact", "copy"]))
    def replace_by_copy(self, which: tuple[int, int], way: str) -> None:
        layout = self.known[which]
        copies = {"deepcopy": copy.deepcopy, "copy": copy.copy, "compact": BlockLayout.compact}
        self.known[which] = pickle.loads(pickle.dumps(layout)) if way == "pickle" else copies[way](layout)

    @rule(which=layouts)
    def drop_and_make_anew(self, which: tuple[int, int]) -> None:
        del self.known[which]
        gc.collect()
        self.make(*which)

    @rule()
    def spoil_memory(self) -> None:
        poison_scratch()

    @rule()
    def forget_memory(self) -> None:
        workspace.clear_scratch()

    @rule(
        which=layouts,
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        window=st.sampled_from([None, 1, 7]),
        mode=st.sampled_from(["here", "thread", "inference first"]),
    )
    def use(self, which: tuple[int, int], dtype: torch.dtype, window: int | None, mode: str) -> None:
        p = call_of(*which, dtype, window)
        layout = self.known[which]

        def work() -> Answer:
            return run(p, layout, seeds_of(p), "blocked")

        if mode == "thread":
            with ThreadPoolExecutor(1) as pool:
                got = pool.submit(work).result()
        else:
            if mode == "inference first":
                with torch.inference_mode():
                    block_sparse_attention(p.q, p.k, p.v, layout, extras=Extras(window=window))
            got = work()
        assert_bitwise(got, run(p, layout_of(p), seeds_of(p), "blocked"))


History.TestCase.settings = settings(max_examples=settings.default.max_examples // 10, stateful_step_count=20)
TestNoHistoryMatters = History.TestCase
