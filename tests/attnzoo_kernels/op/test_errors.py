"""Bad arguments are refused before anything runs, by an error that names them, what came and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo_kernels import (
    AttnzooError,
    BlockLayout,
    Extras,
    ShapeError,
    UnsupportedError,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    merge_states,
    visible_pairs,
    why_not,
)
from tests.attnzoo_kernels.op.test_agreement import both

Z = torch.zeros
I32 = torch.int32


def layout(**change: Any) -> BlockLayout:
    return BlockLayout.dense(*{"block_q": 8, "block_k": 16, "seq_q": 40, "seq_k": 48, **change}.values())


def arguments(**change: Any) -> dict[str, Any]:
    """A good call: 4 heads on 2, 40 queries, 48 keys, widths 8 and 6."""
    good = {"q": Z(2, 4, 40, 8), "k": Z(2, 2, 48, 8), "v": Z(2, 2, 48, 6), "layout": layout()}
    return {**good, **change}


def extras(**fields: Any) -> dict[str, Any]:
    return arguments(extras=Extras(**fields))


def with_origin() -> BlockLayout:
    index = torch.arange(3).expand(1, 1, 5, 3)
    return BlockLayout.from_indices(index, 8, 16, 40, 48, torch.zeros_like(index))


# The call, the error, and what its message must say: the argument, what was expected, what came.
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "q is no tensor": (arguments(q=[1.0]), TypeError, ("q:", "Tensor", "list")),
    "q has three dimensions": (arguments(q=Z(4, 40, 8)), ValueError, ("q:", "four", "[4, 40, 8]")),
    "q is integer": (arguments(q=Z(2, 4, 40, 8, dtype=torch.int64)), TypeError, ("q:", "floating", "int64")),
    "k is complex": (arguments(k=Z(2, 2, 48, 8, dtype=torch.complex64)), TypeError, ("k:", "floating", "complex64")),
    "v is bool": (arguments(v=Z(2, 2, 48, 6, dtype=torch.bool)), TypeError, ("v:", "floating", "bool")),
    "dtypes differ": (arguments(q=Z(2, 4, 40, 8).half()), ValueError, ("q, k, v", "one dtype", "float16", "float32")),
    "devices differ": (arguments(v=Z(2, 2, 48, 6, device="meta")), ValueError, ("q, k, v", "one device", "meta")),
    "heads no multiple": (arguments(q=Z(2, 5, 40, 8)), ValueError, ("heads", "multiple", "5", "2")),
    "no KV heads": (arguments(k=Z(2, 0, 48, 8), v=Z(2, 0, 48, 6)), ValueError, ("heads", "multiple", "4", "0")),
    "batch of k": (arguments(k=Z(3, 2, 48, 8), v=Z(3, 2, 48, 6)), ValueError, ("k:", "[2, 2, S, 8]", "[3, 2, 48, 8]")),
    "width of k": (arguments(k=Z(2, 2, 48, 9)), ValueError, ("k:", "[2, 2, S, 8]", "[2, 2, 48, 9]")),
    "length of v": (arguments(v=Z(2, 2, 47, 6)), ValueError, ("v:", "[2, 2, 48, Dv]", "[2, 2, 47, 6]")),
    "width of 257": (arguments(q=Z(2, 4, 40, 257), k=Z(2, 2, 48, 257)), ValueError, ("head_dim", "256", "257")),
    "width of 0": (arguments(q=Z(2, 4, 40, 0), k=Z(2, 2, 48, 0)), ValueError, ("head_dim", "1", "got 0")),
    "value width of 512": (arguments(v=Z(2, 2, 48, 512)), ValueError, ("v:", "256", "512")),
    "layout is a mask": (arguments(layout=Z(5, 3)), TypeError, ("layout:", "BlockLayout", "Tensor")),
    "layout for other queries": (arguments(layout=layout(seq_q=39)), ValueError, ("layout:", "40", "39")),
    "layout for other keys": (arguments(layout=layout(seq_k=64)), ValueError, ("layout:", "48", "64")),
    "layout with 3 heads": (
        arguments(layout=BlockLayout.from_mask(torch.ones(1, 3, 5, 3).bool(), 8, 16, 40, 48)),
        ValueError,
        ("layout:", "1, 2, 4", "[1, 3, 5]"),
    ),
    "layout with 3 items": (
        arguments(layout=BlockLayout.from_mask(torch.ones(3, 1, 5, 3).bool(), 8, 16, 40, 48)),
        ValueError,
        ("layout:", "1 or 2", "[3, 1, 5]"),
    ),
    "layout elsewhere": (arguments(layout=layout().to("meta")), ValueError, ("layout:", "cpu", "meta")),
    "causal is an int": (arguments(causal=1), TypeError, ("causal:", "bool", "int")),
    "causal is None": (arguments(causal=None), TypeError, ("causal:", "bool", "NoneType")),
    "scale is text": (arguments(scale="0.5"), TypeError, ("scale:", "float", "str")),
    "scale is a bool": (arguments(scale=True), TypeError, ("scale:", "float", "bool")),
    "scale is a tensor": (arguments(scale=torch.tensor(0.5)), TypeError, ("scale:", "float", "Tensor")),
    "impl is unknown": (arguments(impl="cuda"), ValueError, ("impl:", "'blocked'", "'cuda'")),
    "impl is None": (arguments(impl=None), ValueError, ("impl:", "'auto'", "None")),
    "impl is a list": (arguments(impl=["auto"]), (TypeError, ValueError), ("impl:", "'auto'")),
    "extras is a dict": (arguments(extras={"window": 3}), TypeError, ("extras:", "Extras", "dict")),
    "q_pos is a list": (extras(q_pos=[0] * 40), TypeError, ("q_pos:", "Tensor", "list")),
    "q_pos is int64": (extras(q_pos=Z(1, 1, 40).long()), ValueError, ("q_pos:", "int32", "int64")),
    "q_pos lacks heads": (extras(q_pos=Z(2, 40, dtype=I32)), ValueError, ("q_pos:", "[2 or 1, 4 or 1, 40]", "[2, 40]")),
    "q_pos per KV head": (extras(q_pos=Z(1, 2, 40, dtype=I32)), ValueError, ("q_pos:", "4 or 1", "[1, 2, 40]")),
    "q_pos too short": (extras(q_pos=Z(1, 1, 39, dtype=I32)), ValueError, ("q_pos:", "40", "[1, 1, 39]")),
    "q_pos elsewhere": (extras(q_pos=Z(1, 1, 40, dtype=I32, device="meta")), ValueError, ("q_pos:", "cpu", "meta")),
    "key_bias is a float": (extras(key_bias=0.5), TypeError, ("key_bias:", "Tensor", "float")),
    "key_bias is bool": (extras(key_bias=Z(1, 1, 48).bool()), ValueError, ("key_bias:", "float32", "bool")),
    "key_bias is fp64": (extras(key_bias=Z(1, 1, 48).double()), ValueError, ("key_bias:", "float32", "float64")),
    "key_bias of T": (extras(key_bias=Z(1, 1, 40)), ValueError, ("key_bias:", "48", "[1, 1, 40]")),
    "key_bias of 3 heads": (extras(key_bias=Z(1, 3, 48)), ValueError, ("key_bias:", "2 or 4 or 1", "[1, 3, 48]")),
    "window of 0": (extras(window=0), ValueError, ("window:", "at least 1", "0")),
    "window is negative": (extras(window=-4), ValueError, ("window:", "at least 1", "-4")),
    "window is a float": (extras(window=4.0), TypeError, ("window:", "int", "float")),
    "window is a bool": (extras(window=True), TypeError, ("window:", "int", "bool")),
    "window per KV head": (extras(window=Z(2, dtype=I32)), ValueError, ("window:", "[4]", "[2]")),
    "window is int64": (extras(window=Z(4).long()), ValueError, ("window:", "int32", "int64")),
    "sink is negative": (extras(sink=-1), ValueError, ("sink:", "at least 0", "-1")),
    "sink is None": (extras(sink=None), TypeError, ("sink:", "int", "NoneType")),
    "sink is a float": (extras(sink=1.5), TypeError, ("sink:", "int", "float")),
    "sink of wrong length": (extras(sink=Z(5, dtype=I32)), ValueError, ("sink:", "[4]", "[5]")),
    "precision is unknown": (extras(precision="exact"), ValueError, ("precision:", "'fast'", "'exact'")),
    "aux is one tensor": (extras(aux=Z(2, 4, 40, 3)), TypeError, ("aux:", "pair", "Tensor")),
    "aux of other heads": (extras(aux=(Z(2, 2, 40, 3), Z(2, 2, 48, 3))), ValueError, ("q_aux:", "4", "[2, 2, 40, 3]")),
    "aux of two widths": (extras(aux=(Z(2, 4, 40, 3), Z(2, 2, 48, 5))), ValueError, ("k_aux:", "3", "[2, 2, 48, 5]")),
    "gate is unknown": (extras(gate="first"), ValueError, ("gate:", "'last'", "'first'")),
    "gate of other blocks": (extras(gate=Z(2, 2, 4, 8)), ValueError, ("gate:", "3", "[2, 2, 4, 8]")),
    "gate_mix is text": (extras(gate_mix="1"), TypeError, ("gate_mix:", "float", "str")),
    "gate_mix per KV head": (extras(gate_mix=Z(2)), ValueError, ("gate_mix:", "[4]", "[2]")),
    "rope without origin": (extras(rope=(Z(9, 4), Z(9, 4))), ValueError, ("rope", "origin")),
    "rope is one tensor": (
        arguments(layout=with_origin(), extras=Extras(rope=Z(9, 4))),
        TypeError,
        ("rope:", "pair", "Tensor"),
    ),
    "rope of three tables": (
        arguments(layout=with_origin(), extras=Extras(rope=(Z(9, 4),) * 3)),
        (TypeError, ValueError),
        ("rope:", "pair"),
    ),
    "rope of no places": (
        arguments(layout=with_origin(), extras=Extras(rope=(Z(0, 4), Z(0, 4)))),
        ValueError,
        ("rope:", "at least one position", "none"),
    ),
    "gate_mix is integer": (extras(gate="last", gate_mix=Z(4).int()), TypeError, ("gate_mix:", "floating", "int32")),
    "origin without rope": (arguments(layout=with_origin()), ValueError, ("rope", "origin")),
}


@pytest.mark.parametrize(("call", "kind", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_with_what_came_and_what_was_expected(
    call: dict[str, Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        block_sparse_attention(**call)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
def test_every_implementation_and_every_entry_refuses_alike(impl: str) -> None:
    bad = arguments(v=Z(2, 2, 47, 6))
    messages = set()
    for call in (block_sparse_attention, block_sparse_attention_with_lse):
        with pytest.raises(ShapeError) as caught:
            call(**bad, impl=impl)
        messages.add(str(caught.value))
    with pytest.raises(ShapeError) as caught:
        why_not(impl, **bad)
    assert messages == {str(caught.value)}


def test_every_error_on_purpose_is_an_error_of_attnzoo_and_of_python() -> None:
    with pytest.raises(AttnzooError):
        block_sparse_attention(**arguments(layout=layout(seq_q=39)))
    assert issubclass(ShapeError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)


def test_triton_on_a_cpu_is_refused_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    reasons = why_not("triton", **arguments())
    assert reasons
    with pytest.raises(UnsupportedError, match="triton") as caught:
        block_sparse_attention(**arguments(), impl="triton")
    assert caught.value.reasons == reasons


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
def test_no_reason_means_that_it_runs(impl: str) -> None:
    assert why_not(impl, **arguments()) == ()
    assert block_sparse_attention(**arguments(), impl=impl).shape == (2, 4, 40, 6)


def test_auto_on_a_cpu_is_the_blocked_one() -> None:
    call = arguments(q=torch.randn(2, 4, 40, 8), k=torch.randn(2, 2, 48, 8), v=torch.randn(2, 2, 48, 6))
    assert torch.equal(block_sparse_attention(**call), block_sparse_attention(**call, impl="blocked"))


@pytest.mark.parametrize(
    ("outs", "lses"),
    [
        ([], []),
        ([Z(1, 2, 3)], []),
        ([Z(1, 2, 3), Z(1, 2, 4)], [Z(1, 2), Z(1, 2)]),
        ([Z(1, 2, 3), Z(1, 2, 3)], [Z(1, 2), Z(1, 3)]),
        ([Z(1, 2, 3)], [Z(1, 2, 1)]),
    ],
    ids=["nothing", "an lse too few", "two widths", "two lengths", "an lse with a width"],
)
def test_states_that_do_not_fit_are_not_merged(outs: list[Any], lses: list[Any]) -> None:
    with pytest.raises(ShapeError, match=r"outs, lses: expected .*, got"):
        merge_states(outs, lses)


def test_visible_pairs_refuses_heads_that_do_not_fit_the_layout() -> None:
    two_heads = BlockLayout.from_mask(torch.ones(1, 2, 5, 3).bool(), 8, 16, 40, 48)
    with pytest.raises(ShapeError, match="heads: expected a multiple of the layout's 2 heads, got 3"):
        visible_pairs(two_heads, causal=True, batch=1, heads=3)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch": 3}, "batch"),
        ({"batch": -1}, "batch"),
        ({"heads": 0}, "heads"),
        ({"heads": 2.0}, "heads"),
        ({"extras": Extras(window=0)}, "window"),
        ({"extras": Extras(q_pos=Z(1, 1, 9, dtype=I32))}, "q_pos"),
        ({"extras": Extras(key_bias=Z(1, 1, 47))}, "key_bias"),
        ({"causal": 1}, "causal"),
        ({"extras": Extras(gate=Z(2, 2, 4, 8))}, "gate: expected shape"),
        ({"extras": Extras(gate=Z(2, 3, 3, 8))}, "gate: expected shape"),
        ({"extras": Extras(gate="first")}, "gate: expected"),
        ({"extras": Extras(gate_mix=Z(2))}, "gate_mix: expected shape"),
        ({"extras": Extras(aux=(Z(2, 4, 40, 3), Z(2, 2, 47, 3)))}, "k_aux: expected shape"),
        ({"extras": Extras(aux=(Z(2, 2, 40, 3), Z(2, 2, 48, 3)))}, "q_aux: expected shape"),
        ({"extras": Extras(aux=(Z(2, 4, 40, 3), Z(2, 2, 48, 5)))}, "k_aux: expected shape"),
        ({"extras": Extras(aux=Z(2, 4, 40, 3))}, "aux: expected a pair"),
        ({"extras": Extras(rope=(Z(9, 4), Z(9, 4)))}, "rope: expected together"),
        ({"layout": with_origin(), "extras": Extras(rope=(Z(9), Z(9)))}, "rope cos: expected shape"),
        ({"layout": with_origin(), "extras": Extras(rope=(Z(9, 4), Z(9, 3)))}, "rope: expected cos and sin of one"),
        ({"layout": with_origin(), "extras": Extras(rope=(Z(0, 4), Z(0, 4)))}, "rope: expected tables of at least"),
        ({"extras": Extras(precision="exact")}, "precision"),
    ],
)
def test_visible_pairs_refuses_what_the_call_refuses(change: dict[str, Any], name: str) -> None:
    two_items = BlockLayout.from_mask(torch.ones(2, 1, 5, 3).bool(), 8, 16, 40, 48)
    good = {"causal": True, "batch": 2, "heads": 4, "extras": None}
    with pytest.raises((ValueError, TypeError), match=name):
        visible_pairs(**{"layout": two_items, **good, **change})


def test_a_count_takes_what_a_call_takes_and_origins_without_their_tables() -> None:
    aux = (Z(2, 4, 40, 3), Z(1, 1, 48, 3))
    plain = visible_pairs(layout(), causal=True, batch=2, heads=4)
    assert visible_pairs(layout(), causal=True, extras=Extras(aux=aux), batch=2, heads=4) == plain
    turned = Extras(rope=(Z(9, 4), Z(9, 4)))
    for extras_ in (None, Extras(), turned):
        assert visible_pairs(with_origin(), causal=True, extras=extras_, batch=2, heads=4) == plain
    gated = Extras(gate=Z(2, 2, 3, 8), gate_mix=torch.ones(4))
    assert visible_pairs(layout(), causal=True, extras=gated, batch=2, heads=4) == plain


@both
def test_a_refused_call_leaves_the_next_one_alone(impl: str) -> None:
    good = arguments(q=torch.ones(2, 4, 40, 8))
    before = block_sparse_attention(**good, impl=impl)
    with pytest.raises(ShapeError):
        block_sparse_attention(**{**good, "v": Z(2, 2, 47, 6)}, impl=impl)
    assert torch.equal(block_sparse_attention(**good, impl=impl), before)
