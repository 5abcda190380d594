"""Wrong mixtures of heads on purpose: a few checks that the right one passes must fail on every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.oracles import moh as oracle
from attnzoo.variants.moh import divided, routed_rows, router
from attnzoo.variants.moh import layer as moh
from tests.attnzoo.cases import assert_same, recipe_of, tokens
from tests.attnzoo.variants.test_moh import config_of, joined, layer_of, routing_of, some_padding
from tests.attnzoo_kernels.test_mutants import rewrite, wrap

Patch = pytest.MonkeyPatch
CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_heads": 8, "num_kv_heads": 4, "shared_heads": 3, "active_heads": 2, "window": 6, "sink": 2, "block_size": 4},
    {"num_heads": 8, "shared_heads": 2, "active_heads": 3, "router": "norm"},
)


def check(options: dict[str, Any]) -> None:
    """Output, loss and one gradient are the oracle's; a token after the others is what it is among them."""
    layer = layer_of(config_of(**options, compute="routed"))
    config, length = layer.config, 23
    # Without padding, positions come from the call alone.
    key_padding = some_padding(length)[:2] if config.window else torch.zeros(2, length, dtype=torch.bool)
    given = key_padding if config.window else None
    x = tokens(layer, 2, length).requires_grad_()
    found = layer.attend(x, key_padding=given)
    expected = oracle.moh(
        x, dict(layer.named_parameters()), recipe_of(config), routing_of(config),
        window=config.window, sink=config.sink, key_padding=key_padding,
    )  # fmt: skip
    assert_same(found.out, expected.out)
    assert_same(found.plan.aux_loss, expected.loss)
    whole = joined(layer).attend(x, key_padding=given)
    assert_same(whole.out, expected.out)
    grads = [torch.autograd.grad(y.out.square().sum(), x)[0] for y in (found, whole, expected)]
    assert_same(grads[0], grads[2], scale=10)
    assert_same(grads[1], grads[2], scale=10)
    cache = layer.new_cache(2, length)
    with torch.no_grad():
        parts = [
            layer.attend(x[:, a:b], key_padding=None if given is None else given[:, a:b], cache=cache)
            for a, b in ((0, 11), (11, 12), (12, length - 1), (length - 1, length))
        ]
    assert_same(torch.cat([part.out for part in parts], 1), found.out)
    assert found.plan.density < 1


def text(owner: Any, name: str, old: str, new: str) -> Callable[[Patch], None]:
    return lambda patch: rewrite(patch, owner, name, old, new)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "a head too few": text(router, "best", ": counts.active // counts.unit]", ": counts.active // counts.unit - 1]"),
    "the shortest queries": text(router, "best", "descending=True", "descending=False"),
    "gates that add up to 1": text(router, "shares", "total * weight", "weight"),
    "one weight for both kinds": text(router, "learned", "types[..., 1:]", "types[..., :1]"),
    "padding in the balance loss": text(router, "balance_loss", "if real is None:", "if True:"),
    "a balance loss of one choice": text(router, "balance_loss", "mean * share", "mean * mean"),
    "no gradient through the gate": text(router, "by_norm", "coefficient * (probs - probs.detach())", "0 * probs"),
    "a gate that is soft": text(router, "by_norm", "chosen.to(probs.dtype) +", "probs +"),
    "rows of the wrong place": text(routed_rows.Rows, "_flat", "token) * heads + head", "token) * heads + 0 * head"),
    "rows of routed heads a token late": text(divided, "two_calls", "slots - tokens if", "slots - tokens + 1 if"),
    "routed heads before the shared ones": text(
        divided, "in_order", "[whole.transpose(1, 2), rows.scatter(routed).transpose(1, 2)]",
        "[rows.scatter(routed).transpose(1, 2), whole.transpose(1, 2)]",
    ),
    "rows projected by another head": text(divided, "project_packed", "weights[shared:]", "weights[:-shared]"),
    "ungated rows where they are projected": text(
        divided, "project_packed", "routed * rows.gather(of_routed)", "routed"
    ),
    "rows added to the next item": text(routed_rows.Rows, "add_products", "(item * self", "((1 - item) * self"),
    "queries of the first head": text(routed_rows.Rows, "_flat", "(item * heads + head)", "(item * heads + 0 * head)"),
    "positions counted from the chunk": text(routed_rows.Rows, "positions", "self.token + first", "self.token"),
    "a window without its sink": text(routed_rows, "windowed_layout", "(sinks < low.unsqueeze(-1))", "(sinks < -1)"),
    "a window's last block forgotten": text(
        routed_rows, "windowed_layout", "near <= high.unsqueeze(-1)", "near < high.unsqueeze(-1)"
    ),
    "ungated rows": lambda patch: wrap(
        patch, moh.MoHAttention, "combine",
        lambda original, layer, step, out, plan: original(
            layer, step, out, replace(plan, head_weight=torch.ones_like(plan.head_weight))
        ),
    ),
    "a step that reads one key less": text(
        divided, "read_in_place", ": position + 1] for x", ": max(1, position)] for x"
    ),
}  # fmt: skip


def passes() -> bool:
    try:
        for options in CONFIGS:
            check(options)
    except (AssertionError, attnzoo.AttnzooError):
        return False
    return True


def test_the_right_one_passes() -> None:
    for options in CONFIGS:
        check(options)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_one_is_found_out(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    # The layer's module holds these by name.
    for name in ("learned", "by_norm", "balance_loss"):
        monkeypatch.setattr(moh, name, getattr(router, name))
    monkeypatch.setattr(moh, "windowed_layout", routed_rows.windowed_layout)
    assert not passes()
