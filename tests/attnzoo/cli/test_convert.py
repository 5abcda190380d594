"""Converting on the command line: what of a checkpoint is kept, which layers, and what a disk may refuse."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import attnzoo
from attnzoo import surgery
from attnzoo.cli import main
from attnzoo.cli.layers import named_layers
from attnzoo.surgery.hosts.checkpoint import load_checkpoint

LAYERS = 4
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
BESIDE = {
    "special_tokens_map.json": '{"unk_token": "?"}',
    "added_tokens.json": "{}",
    "preprocessor_config.json": '{"size": 3}',
    "LICENSE": "as you like",
    "chat_template.jinja": TEMPLATE,
    "merges.txt": "#version: 0.2\n",
    "additional_chat_templates/tools.jinja": "tools",
}
NOT_CARRIED = ("pytorch_model.bin", "run.py", "consolidated.safetensors")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16 with stop tokens of its own, a tokenizer and other files beside its weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "cat": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path)
    (path / "additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (path / name).write_text(text, encoding="utf-8")
    for name in NOT_CARRIED:
        (path / name).write_bytes(b"\x00")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnzoo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


def dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


WINDOW, EXPAND = "mha:window=9,sink=2,block_size=4", "lowrank_gqa:method=expand,num_kv_heads=6"


@pytest.mark.parametrize("to", [WINDOW, EXPAND])
def test_a_checkpoint_keeps_its_dtype_its_stop_tokens_and_the_files_beside_it(
    to: str, run: Run, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, err = run("convert", folder, "--to", to, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["dtype"] == "bfloat16"
    model, tokenizer = surgery.load(out)
    assert dtypes(model) == {torch.bfloat16}
    assert tokenizer("the cat").input_ids == [1, 2]
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": "tools"}
    assert AutoTokenizer.from_pretrained(out)("the cat").input_ids == [1, 2]
    for host in [model] + ([AutoModelForCausalLM.from_pretrained(out)] if to == EXPAND else []):
        found = host.generation_config
        assert (found.eos_token_id, found.temperature, found.do_sample) == ([2, 7], 0.6, True)
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (about["architectures"], about["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    for name in (*BESIDE, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not [name for name in NOT_CARRIED if (out / name).exists()]
    weights = safetensors.torch.load_file(next(out.glob("*.safetensors")))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], stored["model.layers.0.mlp.up_proj.weight"])
    # And once more, from a folder that was converted.
    code, _, err = run("convert", out, "--to", "mha:window=5,sink=1", "--out", tmp_path / "again")
    assert code == 0, err
    assert {file.name for file in (tmp_path / "again").iterdir()} >= {name.partition("/")[0] for name in BESIDE}


@pytest.mark.parametrize("loader", [load_checkpoint, lambda folder: (LlamaForCausalLM.from_pretrained(folder), None)])
def test_files_beside_the_weights_are_carried_by_whoever_loaded_them(
    loader: Callable[[Path], Any], folder: Path, tmp_path: Path
) -> None:
    model, _ = loader(folder)
    surgery.convert(model, "mha")
    surgery.save(model, tmp_path / "as it was")
    other = Tokenizer(models.WordLevel({"?": 0, "mouse": 1}, unk_token="?"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    given = PreTrainedTokenizerFast(tokenizer_object=other, unk_token="?")
    surgery.save(model, tmp_path / "given", tokenizer=given)
    assert surgery.load(tmp_path / "as it was")[1]("the cat").input_ids == [1, 2]
    assert surgery.load(tmp_path / "given")[1]("mouse").input_ids == [1]
    assert not (tmp_path / "given" / "chat_template.jinja").exists()
    assert (tmp_path / "given" / "preprocessor_config.json").exists()
    surgery.save(model, tmp_path / "adapter", tokenizer=given, adapter_only=True)
    base, _ = loader(folder)
    assert surgery.load(tmp_path / "adapter", base=base)[1]("mouse").input_ids == [1]


@pytest.mark.parametrize("name", ["float32", "fp32"])
def test_another_dtype_is_taken_on_request(name: str, run: Run, folder: Path, tmp_path: Path) -> None:
    code, printed, err = run(
        "convert", folder, "--to", EXPAND, "--out", tmp_path / "out", "--dtype", name, "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert json.loads(printed)["dtype"] == "float32"
    assert dtypes(surgery.load(tmp_path / "out")[0]) == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize(
    ("where", "layers"), [("2-", [2, 3]), ("0,2-3", [0, 2, 3]), ("1", [1]), ("0-3,1", [0, 1, 2, 3])]
)
def test_some_layers_are_converted(where: str, layers: list[int], run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, err = run("convert", folder, "--to", EXPAND, "--where", where, "--out", out, "--json")
    assert code == 0, err
    assert [site["site"]["layer"] for site in json.loads(printed)["sites"]] == layers
    heads = [site.kv_heads for site in surgery.find(surgery.load(out)[0])]
    assert heads == [6 if layer in layers else 2 for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("text", "count", "found"),
    [("0", 1, {0}), ("3-", 4, {3}), ("0-", 3, {0, 1, 2}), (" 1 , 2-2 ", 4, {1, 2}), ("0-3", 4, {0, 1, 2, 3})],
)
def test_layers_are_read(text: str, count: int, found: set[int]) -> None:
    assert named_layers(text, count) == found


@pytest.mark.parametrize(
    "text", ["", ",", "-", "-3", "4", "4-", "1-9", "3-1", "a", "1;2", "1..2", "0x1", "1.0", "1e1", "²"]
)
def test_what_names_no_layer_is_refused(text: str) -> None:
    with pytest.raises(attnzoo.ConfigError, match=r"^where: expected "):
        named_layers(text, 4)


BAD = (
    (("--where", "7"), "where: expected layers from 0 to 3"),
    (("--where", "site.layer > 2"), "where: expected layers such as"),
    (("--dtype", "int8"), "dtype: expected one of"),
    (("--device", "tpu"), "device: expected cpu"),
    (("--out", "{tmp}/file/out"), "file is a file"),
)


@pytest.mark.parametrize(("more", "named"), BAD)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    more: tuple[str, ...], named: str, run: Run, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ("--out", "{tmp}/out", *more)
    code, _, err = run("convert", folder, "--to", EXPAND, *(text.format(tmp=tmp_path) for text in arguments))
    assert code in (1, 2)
    assert named in " ".join(err.split())
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


REFUSALS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "full, by safetensors": SafetensorError("Error while serializing: No space left on device (os error 28)"),
    "full, by tokenizers": Exception("No space left on device (os error 28)"),
    "not allowed": PermissionError(errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize(("what", "existed"), [*((what, False) for what in REFUSALS), ("full", True)])
def test_a_disk_that_refuses_is_one_line_and_leaves_what_was_there(
    what: str, existed: bool, run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensors: Any, file: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half")
        raise REFUSALS[what]

    out = tmp_path / "out"
    if existed:
        out.mkdir()
        (out / "attnzoo_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    code, _, err = run("convert", folder, "--to", WINDOW, "--out", out, "--overwrite")
    assert code == 1
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"attnzoo: {out}: not written, and nothing is left of it: ")
    assert ("Permission denied" if what == "not allowed" else "No space left on device") in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_that_cannot_be_written_is_said_before_the_work(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("attnzoo.cli.conversion.call.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    code, _, err = run("convert", folder, "--to", WINDOW, "--out", tmp_path / "deep" / "out")
    assert code == 1
    assert "cannot be written" in err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_name_on_the_hub_is_answered_with_how_to_get_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, _, err = run("inspect", "HuggingFaceTB/SmolLM2-135M")
    assert code == 1
    assert "nothing is downloaded" in err
    assert "hf download HuggingFaceTB/SmolLM2-135M" in " ".join(err.split())
