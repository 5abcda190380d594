"""What memory a prompt takes under a policy: what is held behind it, and no matrix of tokens by tokens in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.scored import H2O
from attnzoo.cache.streams import LARGE, room_on_cpu
from tests.attnzoo.cases import tokens
from tests.attnzoo.policies.lives import layer_of
from tests.attnzoo.policies.settings import entry_of, names
from tests.child import run

SPARE = 2**16
"""Bytes for what calls leave behind beside a cache: layouts and tables of rotations that layers share."""


def allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that torch's allocator has given and not got back when a piece of work is done, and the most meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = work()
    raw = prof.profiler.kineto_results.events()
    events = sorted((event for event in raw if event.name() == "[memory]"), key=lambda event: event.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    del kept
    return now, most


def read_prompt(layer: Any, x: torch.Tensor, cache: Any, *, piece: int) -> Any:
    """The cache behind a prompt, which was read in pieces, and compacted."""
    with torch.no_grad():
        for part in x.split(piece, 1):
            layer(part, cache=cache)
    if isinstance(cache, PagedCache):
        cache.compact()
    return cache


@pytest.mark.parametrize("name", names())
def test_behind_a_prompt_nothing_is_left_but_what_is_held(name: str) -> None:
    layer = layer_of()
    policy = entry_of(name).settings[0].make()
    x = tokens(layer, 1, 512)
    read_prompt(layer, x, layer.new_cache(1, 512, policy=policy), piece=128)
    cache = layer.new_cache(1, 512, policy=policy)
    left, _ = allocated(lambda: read_prompt(layer, x, cache, piece=128))
    assert left < cache.nbytes + SPARE
    assert cache.nbytes > 0


def test_attention_that_rows_receive_is_counted_without_a_matrix_of_tokens_by_tokens() -> None:
    count = 2048
    layer = layer_of()
    x = tokens(layer, 1, count)
    cache = layer.new_cache(1, count, policy=H2O(share=0.4))
    _, most = allocated(lambda: read_prompt(layer, x, cache, piece=count))
    assert most < count * count * 4 * 8 // 4


def test_large_room_is_a_mapping_of_its_own_that_may_be_written_and_small_room_is_none() -> None:
    room = room_on_cpu((3, LARGE // 8), torch.float64)
    assert room.shape == (3, LARGE // 8)
    assert not room.any()
    assert room.data_ptr() % 4096 == 0
    room.fill_(2)
    assert room.clone().sum() == 2 * room.numel()
    assert allocated(lambda: room_on_cpu((LARGE,), torch.float32))[1] == 0
    assert allocated(lambda: room_on_cpu((LARGE // 8,), torch.float32))[1] > 0


PROMPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from attnzoo import policies

tokens, layers = 2048, 12
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=tokens, bos_token_id=None, eos_token_id=None,
)).eval()
ids = torch.randint(0, 64, (1, tokens))
policy = getattr(policies, sys.argv[1])(share=0.25)

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

with policies.applied(model, policy) as run, torch.no_grad():
    before = resident()
    cache = run.new_cache()
    for piece in ids.split(512, 1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    read = resident()
    run.compact(cache)
    held = run.report(cache)
    print(read - before, resident() - before, held.pool_bytes, held.dense_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["H2O", "SnapKV", "TOVA", "KNorm", "EMS"])
def test_a_process_gives_back_what_a_policy_lets_go_of(policy: str) -> None:
    read, left, pool, dense = map(int, run(PROMPT, policy).split()[-4:])
    # The control: rows are seen before they are let go of.
    assert read > 0.9 * dense
    # What the allocator keeps of temporaries does not count: it kept them before.
    assert read - left > (dense - pool) / 2
