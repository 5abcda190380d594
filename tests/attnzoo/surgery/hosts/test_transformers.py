"""What every kind of conversion does in the hands of every version of transformers that is supported.

``make test-transformers`` runs this file with the oldest, with the one before blocks took ``cache``, and the suite with
the newest: forward, greedy and beam generation, padding on the left, saving and loading.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import attnzoo
from attnzoo import surgery
from attnzoo.reporting import versions
from tests.attnzoo.surgery.conversions import ALL, REPLACED, convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

EXACT = 1e-11
PROMPT = 17
NEW = 10
PADDING = [0, 6, 3]
ONE_NAME = r"^(past_key_values|cache): expected the cache by one name"

_models: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    """One converted model of each kind; nothing here changes it."""
    if kind not in _models:
        _models[kind] = tiny()
        convert_as(_models[kind], kind)
    return _models[kind]


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    return model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("kind", ALL)
def test_greedy_generation_of_padded_items_is_that_of_full_forwards_of_each_alone(kind: str) -> None:
    model, tokens = model_of(kind), ids(3, PROMPT)
    mask = padding_mask(PADDING, PROMPT)
    found = generate(model, tokens * mask, attention_mask=mask)
    for item, left in enumerate(PADDING):
        alone = tokens[item : item + 1, left:]
        for _ in range(NEW):
            alone = torch.cat([alone, logits(model, alone, use_cache=False)[:, -1:].argmax(-1)], 1)
        assert found[item, left:].tolist() == alone[0].tolist()
    # A model that says one thing over and over would hide every mistake.
    assert len(set(found[:, PROMPT:].flatten().tolist())) > 4


@pytest.mark.parametrize("kind", ALL)
def test_beams_take_their_caches_along(kind: str) -> None:
    model, tokens, mask = model_of(kind), ids(2, PROMPT), padding_mask([0, 5], PROMPT)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "attention_mask": mask}
    assert generate(model, tokens * mask, **options).tolist() == (
        generate(model, tokens * mask, use_cache=False, **options).tolist()
    )


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_model_says_the_same_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    model, tokens = tiny(layers=1, dtype=torch.float32), ids(2, PROMPT)
    convert_as(model, kind)
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_block_takes_the_cache_by_either_name_and_by_one_alone(kind: str, name: str) -> None:
    model = model_of(kind)
    block, config = model.get_submodule(surgery.find(model)[0].path), model.config
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    places = torch.arange(9).unsqueeze(0)
    if kind == "replaced-landmark":
        # Its replacements are handed what the decoder's input has prepared.
        cache = DynamicCache(config=config)
        with torch.no_grad():
            said = model.model(inputs_embeds=x, **{name: cache}).last_hidden_state
            assert cache.get_seq_length() == 9
            assert torch.equal(model.model(inputs_embeds=x, use_cache=False).last_hidden_state, said)
            with pytest.raises(attnzoo.UnsupportedError, match=ONE_NAME):
                model.model(inputs_embeds=x, past_key_values=cache, cache=cache)
        return
    rotation = model.model.rotary_emb(x, places)
    with torch.no_grad():
        whole, _ = block(x, rotation, position_ids=places)
        parts, cache = [], DynamicCache(config=config)
        for part in (slice(0, 5), slice(5, 9)):
            turned = tuple(table[:, part] for table in rotation)
            said, _ = block(x[:, part], turned, position_ids=places[:, part], use_cache=True, **{name: cache})
            parts.append(said)
        assert_close(torch.cat(parts, 1), whole, EXACT)
        with pytest.raises(attnzoo.UnsupportedError, match=ONE_NAME):
            block(x, rotation, position_ids=places, past_key_values=cache, cache=cache)
        with pytest.raises(attnzoo.UnsupportedError, match=r"^colour: "):
            block(x, rotation, position_ids=places, colour="red")


def test_a_block_that_is_not_causal_is_refused_and_not_made_causal() -> None:
    model, tokens = tiny(), ids(1, 8)
    convert_as(model, "mha")
    with pytest.raises(attnzoo.UnsupportedError, match=r"^(is_causal|attention_mask): "):
        logits(model, tokens, is_causal=False)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(attnzoo.UnsupportedError, match=r"^is_causal: "):
        logits(model, tokens)


@pytest.mark.parametrize("version", ["5.0.0", "5.2.0", "4.57.6", "5.3.9.dev0"])
def test_a_version_that_is_too_old_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(layers=1)
    before = snapshot(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(attnzoo.UnsupportedError, match=rf"^transformers: expected 5\.4 or newer, got {version}; pip"):
        surgery.convert(model, "mha")
    assert_untouched(model, before)


def test_a_version_that_was_not_tested_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.25.0")
    with pytest.warns(UserWarning, match=r"transformers 5\.25\.0 is outside what was tested, 5\.4\.0 to ") as caught:
        surgery.convert(tiny(layers=1), "mha")
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.convert(tiny(layers=1), "mha")
        for version in (*versions.TRANSFORMERS, "5.10.2", "5.24.1"):
            monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
            surgery.convert(tiny(layers=1), "mha")


def test_this_version_is_one_that_was_to_be_tested() -> None:
    assert transformers.__version__ in versions.TRANSFORMERS
