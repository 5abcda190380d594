"""The oracle of landmark attention against the published code's numbers, and against facts that need no code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnzoo.oracles.landmark import Landmarks, Sequence, attend, landmark
from attnzoo.oracles.mha import Recipe, mha
from tests.attnzoo.oracles.published import GQA, STORED_AS_FP32, Golden, near, projections, random


@pytest.mark.parametrize("name", ["landmark_train_w8", "landmark_train_w51", "landmark_train_irregular"])
def test_landmark_is_the_published_grouped_softmax(name: str) -> None:
    golden = Golden(name)
    q, k, v = (golden[key].transpose(1, 2).requires_grad_() for key in "qkv")
    recipe = Recipe(num_heads=2, num_kv_heads=2, head_dim=q.shape[-1], rotary_base=None)
    marks = golden["is_landmark"].bool()
    if name != "landmark_train_irregular":
        size = golden.config["block_length"]
        assert torch.equal(marks[0], torch.arange(len(marks[0])) % size == size - 1)
    places = torch.arange(q.shape[1])
    outs = []
    for b, mark in enumerate(marks.tolist()):
        mark = [bool(one) for one in mark]
        outs.append(attend((q[b], k[b], v[b]), places, mark, recipe, Landmarks())[0])
        eye = torch.eye(len(mark), dtype=torch.float64)[:, None].expand(-1, 2, -1)
        with torch.no_grad():
            weights = attend((q[b], k[b], eye), places, mark, recipe, Landmarks())[0]
        near(weights.transpose(0, 1), golden["weights"][b], STORED_AS_FP32)
        near(weights.sum(-1), torch.ones(len(mark), 2, dtype=torch.float64))
    out = torch.stack(outs)
    near(out, golden["out"].transpose(1, 2))
    grads = torch.autograd.grad((out * golden["d_out"].transpose(1, 2)).sum(), (q, k, v))
    for grad, key in zip(grads, ("dq", "dk", "dv"), strict=True):
        near(grad, golden[key].transpose(1, 2))


def test_landmark_is_the_published_layer_in_training() -> None:
    golden = Golden("landmark_train_rope_w16")
    recipe = Recipe(num_heads=2, num_kv_heads=2, head_dim=16)
    ours = landmark(golden["x"][None], golden.projections(), recipe, Landmarks(block=16))
    near(ours.out[0], golden["out"], STORED_AS_FP32)


@pytest.mark.parametrize("name", ["landmark_retrieval_resident_w8_k3", "landmark_retrieval_offload_w8_k2"])
def test_landmark_is_the_published_layer_in_inference(name: str) -> None:
    golden = Golden(name)
    config, x, weights = golden.config, golden["x"][None], golden.projections()
    recipe = Recipe(num_heads=2, num_kv_heads=2, head_dim=config["head_dim"])
    calls = tuple(golden["call_lengths"].tolist())
    rule = Landmarks(block=config["block_length"], top_k=config["cache_top_k"], mode="topk")
    theirs = landmark(x, weights, recipe, replace(rule, calls=calls, shared_retrieval=config["offload_cache_to_cpu"]))
    padded = [[tuple(b for b in row if b >= 0) for row in head] for head in golden["selected"].tolist()]
    assert theirs.blocks[0] == padded
    near(theirs.out[0], golden["out"], STORED_AS_FP32)
    # Rows of one-token calls are those of our rule, whatever the calls before them.
    steps = x.shape[1] - (len(calls) - next(i for i, count in enumerate(calls) if count == 1))
    ours = landmark(x, weights, recipe, rule)
    near(ours.out[0, steps:], golden["out"][steps:], STORED_AS_FP32)
    assert [head[steps:] for head in ours.blocks[0]] == [head[steps:] for head in padded]


MARKS = torch.zeros(2, 29, dtype=torch.bool)
MARKS[0, [2, 9, 10, 17, 28]] = True
MARKS[1, [0, 6, 13, 20, 27]] = True


def test_landmark_is_plain_attention_where_it_decides_nothing() -> None:
    weights, x = projections(GQA), random(2, 29, 16, seed=9)
    padding = torch.zeros(2, 29, dtype=torch.bool)
    padding[1, [3, 4, 28]] = True

    def ordinary(b: int) -> tuple[Tensor, Tensor]:
        # Positions with the landmarks counted, and attention over the ordinary tokens alone.
        real = (~padding[b]).nonzero().flatten()
        places = (~MARKS[b, real]).nonzero().flatten()
        y = x[b, real][places]
        return real[places], mha(y[None], weights, GQA, positions=places)[0]

    soft = landmark(x, weights, GQA, Landmarks(gate_mix=0.0), is_landmark=MARKS, key_padding=padding).out
    per_head = torch.zeros(4, dtype=torch.float64)
    mixed = landmark(x, weights, GQA, Landmarks(gate_mix=per_head), is_landmark=MARKS, key_padding=padding).out
    for b in range(2):
        rows, plain = ordinary(b)
        near(soft[b, rows], plain)
        near(mixed[b, rows], plain)
    short = landmark(x[:, :6], weights, GQA, Landmarks(block=7)).out
    near(short, mha(x[:, :6], weights, GQA))


def test_landmark_whose_score_is_its_blocks_lse_changes_nothing() -> None:
    # One head of width 2: the query is (1, 0) everywhere, so that a key's first value is its score; no rotation.
    recipe = Recipe(num_heads=1, num_kv_heads=1, head_dim=2, scale=1.0, rotary_base=None)
    marks = [t % 4 == 3 for t in range(14)]
    k = random(14, 1, 2, seed=1)
    for t in range(14):
        if marks[t]:
            k[t, 0, 0] = k[t - 3 : t, 0, 0].logsumexp(0)
    v = random(14, 1, 3, seed=2)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(14, 1, 2)
    out, _ = attend((q, k, v), torch.arange(14), marks, recipe, Landmarks())
    for t in range(14):
        seen = [s for s in range(t + 1) if not marks[s]]
        near(out[t, 0], torch.softmax(k[seen, 0, 0], 0) @ v[seen, 0])


def test_landmark_that_chooses_all_blocks_reads_them_where_they_are() -> None:
    weights, x = projections(GQA), random(2, 29, 16, seed=9)
    for options in ({"is_landmark": MARKS}, {"key_padding": torch.arange(29).expand(2, -1) < 3}):
        soft = landmark(x, weights, GQA, Landmarks(block=4), **options)
        topk = landmark(x, weights, GQA, Landmarks(block=4, mode="topk", top_k=7), **options)
        near(topk.out, soft.out)
        few = landmark(x, weights, GQA, Landmarks(block=4, mode="topk", top_k=2), **options)
        assert float((few.out - soft.out).abs().max()) > 1e-3
        for end in (11, 20, 26):
            cut = {key: mask[:, :end] for key, mask in options.items()}
            short = landmark(x[:, :end], weights, GQA, Landmarks(block=4, mode="topk", top_k=2), **cut)
            near(short.out, few.out[:, :end])


def test_landmark_chooses_also_where_landmarks_take_no_position() -> None:
    # Four tokens and a landmark that stands where the token before it does: positions of blocks of four.
    weights, x = projections(GQA), random(1, 33, 16, seed=9)
    places = torch.tensor([t - t // 5 - (t % 5 == 4) for t in range(33)])
    soft, topk = Landmarks(block=5), Landmarks(block=5, mode="topk", top_k=6)
    full = landmark(x, weights, GQA, soft, positions=places).out
    near(landmark(x, weights, GQA, topk, positions=places).out, full)
    near(landmark(x, weights, GQA, soft, positions=places + 100).out, full)
    few = landmark(x, weights, GQA, replace(topk, top_k=2), positions=places)
    near(landmark(x, weights, GQA, replace(topk, top_k=2), positions=places + 100).out, few.out)
    assert {len(row) for row in few.blocks[0][0]} == {0, 1, 2}
    # Blocks 4 and 5 of six are near; the others lie a block further back than their rank among the chosen.
    empty = torch.zeros(33, 1, 2, dtype=torch.float64)
    marks = [t % 5 == 4 for t in range(33)]
    sequence = Sequence((empty, empty, empty), places, marks, Recipe(num_heads=1, num_kv_heads=1, head_dim=2))
    assert sequence.shifts((1, 5), 6, 2) == {1: 12 - 4, 5: 0}
    assert sequence.shifts((0, 1), 6, 2) == {0: 12, 1: 16 - 4}


def test_landmark_blocks_lie_where_the_published_positions_say() -> None:
    size, length, top_k = 4, 39, 3
    empty = torch.zeros(length, 1, 2, dtype=torch.float64)
    recipe = Recipe(num_heads=1, num_kv_heads=1, head_dim=2)
    marks = [t % size == size - 1 for t in range(length)]
    sequence = Sequence((empty, empty, empty), torch.arange(length), marks, recipe)
    blocks, prefix = length // size, (length // size - top_k - 1) * size
    for found in ((6, 7, 8), (0, 2, 5), (1, 6, 8), (0, 1, 7)):
        moved = sequence.shifts(found, blocks, top_k)
        for r, b in enumerate(found):
            published = prefix + r * size + (size if b >= blocks - top_k else 0)
            assert b * size + moved[b] == published


def test_landmark_takes_more_blocks_than_the_published_code_and_blocks_of_nothing() -> None:
    weights, x = projections(GQA), random(1, 141, 16, seed=9)
    with torch.no_grad():
        ours = landmark(x, weights, GQA, Landmarks(block=2, gate_mix=0.0)).out[0]
        places = torch.arange(0, 141, 2)
        near(ours[places], mha(x[:, places], weights, GQA, positions=places)[0])
    first = torch.zeros(1, 3, dtype=torch.bool)
    first[0, 0] = True
    alone = landmark(x[:, :3], weights, GQA, Landmarks(), is_landmark=first).out
    assert not bool(alone[0, 0].any())
    near(alone[:, 1:], mha(x[:, 1:3], weights, GQA))
    with pytest.raises(ValueError, match="make up the sequence"):
        landmark(x, weights, GQA, Landmarks(calls=(3, 4)))
