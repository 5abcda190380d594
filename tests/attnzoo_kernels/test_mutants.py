"""Wrong implementations on purpose: a small set of checks that the right one passes must fail on every one of them."""

from __future__ import annotations

import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import reference
from attnzoo_kernels.blocks import gates as gating
from attnzoo_kernels.cpu import blocked, gather, schedule, scores
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import TokenRule
from tests.attnzoo_kernels.checks import CHECKS, fixed_problems, switches, truth

Patch = pytest.MonkeyPatch


def passes(impl: str) -> bool:
    try:
        for check in CHECKS:
            check(impl)
    except (AssertionError, RuntimeError):
        # torch itself refuses to read behind the end of a tensor.
        return False
    return True


def wrap(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function by ``change(original, *its arguments)``."""
    original = getattr(owner, name)

    def mutant(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    patch.setattr(owner, name, mutant)


def rewrite(patch: Patch, owner: Any, name: str, old: str, new: str) -> None:
    """Replaces a piece of a function's text; fails where the text is not there exactly once."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} holds {old!r} {source.count(old)} times: the mutant needs a new place"
    module = inspect.getmodule(function)
    assert isinstance(module, types.ModuleType)
    scope = dict(vars(module))
    exec(
        compile(f"from __future__ import annotations\n{source.replace(old, new)}", f"<mutant of {name}>", "exec"), scope
    )
    patch.setattr(owner, name, scope[name])


def span_with(change: Callable[[Tensor, Tensor, TokenRule, Any], tuple[Tensor, Tensor]]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def mutant(original: Any, rule: TokenRule, pos: Tensor, window: Any, seq_k: int) -> tuple[Tensor, Tensor]:
            return change(*original(rule, pos, window, seq_k), rule, window)

        wrap(patch, TokenRule, "span", mutant)

    return apply


def sink_with(shift: int) -> Callable[[Patch], None]:
    return lambda patch: wrap(patch, TokenRule, "sink_end", lambda f, *args: (f(*args) + shift).clamp(min=0))


def positions_with(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: wrap(patch, TokenRule, "positions", change)


def forward_with(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: wrap(patch, blocked, "forward", change)


def backward_with(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: wrap(patch, blocked, "_accumulate", change)


def text(owner: Any, name: str, old: str, new: str) -> Callable[[Patch], None]:
    return lambda patch: rewrite(patch, owner, name, old, new)


def every_block_read(original: Any, *args: Any) -> tuple[Tensor, ...]:
    read, full, anchored = original(*args)
    return torch.ones_like(read), full, anchored


def every_block_full(original: Any, *args: Any) -> tuple[Tensor, ...]:
    read, _, anchored = original(*args)
    return read, torch.ones_like(read), anchored


def without_last_chunk(original: Any, *args: Any, **options: Any) -> Iterator[Any]:
    held: list[Any] = []
    for chunk in original(*args, **options):
        yield from held
        held = [chunk]


def schedule_of_layout_alone(original: Any, call: Call) -> Any:
    if not call.rule.is_static or call.origins is not None:
        return original(call)
    known = vars(schedule_of_layout_alone).setdefault("known", {})
    key = id(call.col)
    if key not in known:
        known[key] = (original(call), call.col)
    return known[key][0]


def log_two(original: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = original(*args, **options)
    return out, lse / math.log(2)


def empty_rows_at_zero(original: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = original(*args, **options)
    return out, lse.nan_to_num(neginf=0.0)


def dout_by_memory(original: Any, call: Call, dout: Tensor, dlse: Tensor, need: Any) -> Any:
    shape = dout.shape
    flat = torch.as_strided(dout, (dout.numel(),), (1,))
    return original(call, flat.view(shape), dlse, need)


def no_gap_at_the_tail(patch: Patch) -> None:
    def mutant(original: Any, rule: TokenRule, pos: Tensor, window: Any, seq_k: int) -> tuple[Tensor, Tensor]:
        return original(rule, pos, window, -(-seq_k // 6) * 6)

    wrap(patch, TokenRule, "span", mutant)


def single_precision(patch: Patch) -> None:
    patch.setattr(Call, "acc_dtype", property(lambda call: torch.float32))


def no_absent_rows(original: Any, rule: TokenRule, *args: Any) -> Tensor:
    return original(rule, *args).clamp(min=0)


def top_left(original: Any, rule: TokenRule, seq_q: int, seq_k: int, device: Any) -> Tensor:
    pos = original(rule, seq_q, seq_k, device)
    tokens = seq_q if rule.packed is None else rule.packed.tokens
    return pos if rule.q_pos is not None else pos - (seq_k - tokens)


def layout_heads_by_remainder(patch: Patch) -> None:
    old, new = "source.repeat_interleave(heads // src_heads, 1)", "source.repeat(1, heads // src_heads, 1)"
    rewrite(patch, schedule, "build_schedule", old, new)
    patch.setattr(schedule.schedule_for, "__defaults__", (schedule.build_schedule,))


BLOCKED: dict[str, Callable[[Patch], None]] = {
    "causality shows the next key": span_with(lambda lo, hi, rule, _: (lo, hi + rule.causal * (hi > 0))),
    "causality hides the own key": span_with(lambda lo, hi, rule, _: (lo, (hi - int(rule.causal)).clamp(min=0))),
    "causality aligned at the first key": positions_with(top_left),
    "a window one key wider": span_with(lambda lo, hi, _, w: (lo if w is None else (lo - 1).clamp(min=0), hi)),
    "a window one key narrower": span_with(lambda lo, hi, _, w: (lo if w is None else lo + 1, hi)),
    "a window that ends one key late": span_with(
        lambda lo, hi, rule, w: (lo, hi if w is None or rule.causal else hi + 1)
    ),
    "a sink one key larger": sink_with(1),
    "a sink one key smaller": sink_with(-1),
    "a tail of keys that are not there": no_gap_at_the_tail,
    "absent rows at slot 0": positions_with(no_absent_rows),
    "positions of packed heads mixed up": text(
        TokenRule, "positions", "token.view(-1, 1, block).expand(-1, heads, -1).reshape(1, 1, seq_q)",
        "token.repeat(heads).view(1, 1, seq_q)",
    ),
    "heads on KV heads by remainder": text(
        schedule, "_first_blocks", "(head % heads) // (heads // groups)", "head % heads % groups"
    ),
    "layout heads by remainder": layout_heads_by_remainder,
    "bias of the first item for all": text(scores.Inputs, "blocks_in", "(head // heads) * source.heads", "head * 0"),
    "bias of the first head for all": text(
        scores.Inputs, "blocks_in", "(head % heads) * source.heads // heads", "0"
    ),
    "partial blocks without a mask": lambda patch: wrap(patch, scores, "_hide", lambda f, *args: None),
    "every block taken as full": lambda patch: wrap(patch, schedule, "classify", every_block_full),
    "hidden blocks read": lambda patch: wrap(patch, schedule, "classify", every_block_read),
    "the last chunk forgotten": lambda patch: wrap(patch, blocked, "chunks_of", without_last_chunk),
    "a schedule remembered for another rule": lambda patch: wrap(
        patch, blocked, "schedule_for", schedule_of_layout_alone
    ),
    "log-sum-exp to base two": forward_with(log_two),
    "log-sum-exp of empty rows 0": forward_with(empty_rows_at_zero),
    "accumulators in single precision": single_precision,
    "the gradient of the log-sum-exp lost": backward_with(lambda f, i, c, dout, dlse, *r: f(i, c, dout, None, *r)),
    "the gradient of the log-sum-exp negated": backward_with(lambda f, i, c, dout, dlse, *r: f(i, c, dout, -dlse, *r)),
    "output gradients taken as contiguous": lambda patch: wrap(patch, blocked, "backward", dout_by_memory),
    "dQ without the scale": text(
        blocked, "_accumulate", "chunk.k, out=here, scale=call.scale", "chunk.k, out=here, scale=1.0"
    ),
    "dK scaled twice": text(
        blocked, "_accumulate", "dscores, chunk.q, scale=call.scale", "dscores, chunk.q, scale=call.scale**2"
    ),
    "dK and dV overwritten instead of added": text(blocked, "_add", "index_add_", "index_copy_"),
    "gradients of a run overwritten instead of added": text(blocked, "_add_product", "add=True", "add=False"),
    "gradients of a run one block late": text(
        blocked, "_add_product", "chunk.part.firsts[0]", "(chunk.part.firsts[0] + 1)"
    ),
    "a step of several tokens that sees what its last one sees": text(
        schedule, "_seen_by_all", "first + 1 if rule.causal", "last + 1 if rule.causal"
    ),
    "a step of several tokens with the window of its first": text(
        schedule, "_seen_by_all", "last - window + 1", "first - window + 1"
    ),
    "any blocks of a step taken for a run": text(
        schedule, "_one_block", "bool((cols.diff(dim=1) == 1).all())", "True"
    ),
    "any blocks taken for a run": text(schedule, "_buckets", "not broken[i]", "True"),
    "runs of the first head for all": text(gather.Source, "view", "of_head % self.heads * head", "0 * head"),
    "runs at unequal distances viewed": text(
        gather.Source, "view", "any(later - earlier != distance for earlier, later in pairwise(offsets))", "False"
    ),
    "a run longer than the keys": text(gather.Source, "view", "rows -= beyond", "pass"),
    "rows taken for neighbours": lambda patch: patch.setattr(
        schedule.Bucket, "span", property(lambda part: slice(part.row_indices[0], part.row_indices[0] + len(part.rows)))
    ),
    "softmax backward without delta": text(
        blocked, "_through_softmax",
        "torch.ops.aten._softmax_backward_data.out(dscores, chunk.probs, -1, inputs.call.acc_dtype, "
        "grad_input=dscores)",
        "dscores.mul_(chunk.probs)",
    ),
    "no second look at what comes out": text(blocked, "forward", "not are_numbers(out)", "False"),
    "no second look on the way back": text(blocked, "backward", "not are_numbers(*grads.every)", "False"),
    "NaN of hidden keys in scores": text(
        blocked, "weigh", "scores.masked_fill_(unseen, -torch.inf)", "scores.sub_(torch.where(unseen, torch.inf, 0.0))"
    ),
    "NaN of hidden values in the products": text(blocked, "product_where_seen", "x.masked_fill(wrong, 0.0)", "x"),
    "NaN of hidden values in gradients of weights": text(
        blocked, "_through_softmax", "chunk.probs == 0 if inputs.careful else None", "None"
    ),
    "NaN that is seen, lost": text(
        blocked, "product_where_seen", "found.add_(torch.where(touched, spoiled, 0.0))", "found"
    ),
    "uniform weights in empty rows": text(
        scores, "_normalise", "out=scores)\n    if dead is not None:", "out=scores)\n    if False:"
    ),
    "the scale forgotten": text(blocked, "weigh", "call.scale if wide", "1.0 if wide"),
    "the bias forgotten": text(blocked, "weigh", "scores += bias\n", "pass\n"),
    "auxiliary channels forgotten": text(
        blocked, "weigh", 'product("scores", q_aux, k_aux.transpose(1, 2), out=scores, scale=scale, add=True)', "pass"
    ),
    "origins turned the other way": text(scores.Rotation, "rotate", "if back", "if not back"),
    "gradients of rotated keys not rotated back": text(
        scores.Rotation, "rotate", "self.table_back if back else self.table", "self.table"
    ),
    "the own block gated": text(gating, "_mixed", "torch.where(own, total, mixed)", "mixed"),
    "blocks of hidden landmarks kept": text(
        gating, "_mixed", "where(logits == -torch.inf, -torch.inf, mix", "where(logits == -torch.inf, total, mix",
    ),
    "landmarks read as ordinary keys": text(gating, "weigh", "inner[..., block - 1] = -torch.inf", "pass"),
    "the gradient of landmarks lost": text(gating, "unweigh", "dscores[..., -1] = through_gate", "pass"),
    "the gradient of gates unmixed": text(gating, "unweigh", "change * gated.mix", "change"),
}  # fmt: skip
REFERENCE: dict[str, Callable[[Patch], None]] = {
    "causality shows the next key": BLOCKED["causality shows the next key"],
    "a window one key wider": BLOCKED["a window one key wider"],
    "the scale squared": text(reference, "attend", "scores * call.scale", "scores * call.scale**2"),
    "the bias forgotten": text(reference, "attend", "scores + bias.to(acc)", "scores + 0 * bias.to(acc)"),
    "NaN of absent rows": text(reference, "_where_seen", "torch.where(finite_q, q, 0.0)", "q"),
    "NaN of hidden keys": text(reference, "_where_seen", "torch.where(finite_k, k, 0.0)", "k"),
    "NaN of hidden values": text(reference, "_weighted", "torch.where(finite.transpose(-1, -2), v, 0.0)", "v"),
    "log-sum-exp without the shift": text(reference, "attend", "peak + torch.log(total)", "torch.log(total)"),
    "layout heads by remainder": text(
        reference, "layout_mask", "keep.repeat_interleave(heads // keep.shape[1], 1)",
        "keep.repeat(1, heads // keep.shape[1], 1, 1)",
    ),
    "origins turned the other way": text(reference, "_rotate", "first * cos - second", "first * cos + second"),
    "the own block gated": text(reference, "_gated", "torch.where(own, total, ", "torch.where(own & False, total, "),
}  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_the_right_implementation_passes_every_check(impl: str) -> None:
    for check in CHECKS:
        check(impl)


@pytest.fixture
def truths_known() -> None:
    """The oracle has no part in a mutation, but is asked before it all the same."""
    for name in fixed_problems():
        truth(name)
    switches()


@pytest.mark.usefixtures("truths_known")
@pytest.mark.slow
@pytest.mark.parametrize("mutant", BLOCKED.values(), ids=BLOCKED.keys())
def test_a_wrong_blocked_implementation_is_found_out(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert not passes("blocked")


@pytest.mark.usefixtures("truths_known")
@pytest.mark.slow
@pytest.mark.parametrize("mutant", REFERENCE.values(), ids=REFERENCE.keys())
def test_a_wrong_reference_is_found_out(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert not passes("reference")
