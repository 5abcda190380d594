"""Of caches that are carried, replayed and mapped over, and of what an export or a compiler leaves open."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo"
state = partial(
    Mutant, file="attnzoo/cache/state.py", tests=f"{TESTS}/cache/test_state.py -k 's2 or rcmha or positions'"
)
cache = partial(
    Mutant, file="attnzoo/cache/kv_cache.py", tests=f"{TESTS}/cache/test_state.py -k 'copied_cache and mha'"
)
rows = partial(Mutant, file="attnzoo/cache/rows.py", tests=f"{TESTS}/cache/test_state.py -k 'copied_cache and mha'")
ring = partial(Mutant, file="attnzoo/cache/streams.py", tests=f"{TESTS}/cache/test_state.py -k 'twin and rcmha'")
replay = partial(Mutant, file="attnzoo/cache/replay.py", tests=f"{TESTS}/cache/test_replay.py -k 'mha or s2'")
compiled = partial(Mutant, file="attnzoo/cache/replay.py", tests=f"{TESTS}/laws/test_compiled_replay.py")
plain = partial(
    Mutant, file="kernels/attnzoo_kernels/runtime/plain.py", tests=f"{TESTS}/laws/test_vmap.py -k 'moh and auto'"
)
vmap = partial(
    Mutant, file="kernels/attnzoo_kernels/registration.py", tests=f"{TESTS}/laws/test_vmap.py -k 'landmark and auto'"
)
filled = partial(
    Mutant,
    file="attnzoo/base/padding.py",
    tests=f"{TESTS}/laws/test_export.py -k 'one_program or large'",
)

MUTANTS = (
    state(
        "state-shares",
        old="return x.detach().clone(memory_format=torch.contiguous_format)",
        new="return x.detach()",
        wrong="what is saved changes as the cache goes on, and is no tensor of its own",
    ),
    state(
        "state-any-config",
        old="if own.get(name) != given.get(name):",
        new="if False:",
        wrong="the state of a layer of another configuration is taken",
    ),
    state(
        "state-any-dtype",
        old="value.shape != like.shape or value.dtype != like.dtype",
        new="value.shape != like.shape",
        wrong="values of another dtype are rounded without a word",
    ),
    state(
        "state-keeps-old-positions",
        file="attnzoo/variants/rcmha/layer.py",
        within="PlacedCache._buffers_for",
        old='if name != "position"',
        new="if True",
        wrong="positions that an earlier state had stay",
    ),
    state(
        "state-evicting-of-no-length",
        file="attnzoo/cache/evicting/cache.py",
        within="EvictingCache._held",
        old="region.rows(bound) if bound else 0",
        new="region.rows(self.max_length)",
        wrong="what a cache that evicts has room for is carried, so that only a cache of as much room can take it",
    ),
    ring(
        "ring-load-shifted",
        within="Ring.load",
        old="token = torch.arange(-value.shape[2], 0, device=self.values.device)",
        new="token = torch.arange(-value.shape[2], 0, device=self.values.device) + 1",
        wrong="carried values belong to the tokens behind them",
    ),
    rows(
        "copy-stays",
        within="RowCache._belongs_to",
        old="return self._heir if self._heir is not None and self._heir.taken else self._owner",
        new="return self._owner",
        wrong="a cache that is copied with its layer belongs to the old one",
    ),
    rows(
        "copy-always-leaves",
        within="RowCache._belongs_to",
        old="return self._heir if self._heir is not None and self._heir.taken else self._owner",
        new="return self._heir if self._heir is not None else self._owner",
        wrong="a cache that is copied alone belongs to nobody",
    ),
    replay(
        "replay-silent",
        within="refuse_replay",
        old="if current_backward() not in (-1, born):",
        new="if False:",
        wrong="a replayed call appends its tokens once more",
    ),
    replay(
        "replay-too-strict",
        within="refuse_replay",
        old="not in (-1, born)",
        new="!= -1",
        wrong="a cache that is made inside the checkpointed part is refused",
    ),
    compiled(
        "compiled-replay-silent",
        within="Birth.refuse_replay",
        old="if _runs_later():",
        new="if False:",
        wrong="a compiled call that is replayed appends its tokens once more",
    ),
    compiled(
        "compiled-replay-left-out",
        old="refuse_replay(Tensor(a!) mark",
        new="refuse_replay(Tensor mark",
        wrong="a compiler drops the question, whose answer nobody uses",
    ),
    compiled(
        "compiled-birth-while-traced",
        within="Birth.__init__",
        old="torch.ops.attnzoo.current_backward(self.mark) if _runs_later() else current_backward()",
        new="current_backward()",
        wrong="a cache that a compiled part makes is taken for one from outside",
    ),
    compiled(
        "compiled-birth-unread",
        within="_refuse_replay",
        old="number if then is None else int(then)",
        new="number",
        wrong="compiled calls do not ask when a cache was made that a compiled part has made",
    ),
    plain(
        "plain-wrappers",
        within="is_plain",
        old="return not torch._C._functorch.is_functorch_wrapped_tensor(x)",
        new="return True",
        wrong="vmap's wrappers are taken for tensors whose values can be read",
    ),
    vmap(
        "vmap-one-list",
        within="_batch_lists",
        old=".view(-1, 1, 1, 1) * col.shape[1]",
        new=".view(-1, 1, 1, 1) * 0",
        wrong="all calls read the first one's blocks",
    ),
    filled(
        "export-one-block",
        within="Filled.of",
        old="(tokens // block + least) * block",
        new="(tokens // block + least - 1) * block",
        wrong="an exported program serves one side of a block",
    ),
    filled(
        "export-filling-seen",
        within="Filled.take_padding",
        old="return padding.index_select(1, self.source) | ~self.is_real",
        new="return padding.index_select(1, self.source)",
        wrong="what fills a call up counts as tokens where the last one is real",
        survives="causal rows see nothing behind them: only layers that are not causal, which the slow tests run",
    ),
)
