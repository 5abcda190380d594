"""The import contracts of pyproject.toml hold, and each of them bites: an offence of its kind, planted in a copy."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from importlinter import api
from importlinter.application import use_cases
from importlinter.application.ports.reporting import Report

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"attnzoo": ROOT / "attnzoo", "attnzoo_kernels": ROOT / "kernels" / "attnzoo_kernels"}

LAYERS = "Folders of attnzoo are layers, and arrows point down"
SURGERY = "Folders of surgery are layers"
VARIANTS = "Variants do not know each other"
ORACLES = "Oracles know torch alone"
TRANSFORMERS = "Only surgery.hosts imports transformers"
XFORMERS = "Nothing imports xformers"
TRITON = "Only _triton imports triton"
KERNELS = "The kernels do not know the layers"
FACE = "Layers reach the kernels by their face and their errors"
INSIDE = "Folders of the kernels are layers, and arrows point down"
IMPLEMENTATIONS = "Implementations do not know each other"
GPU = "Kernels for GPUs share nothing with those for CPUs but the call and its lists"


@dataclass(frozen=True)
class Offence:
    """An import that a contract forbids, written at the end of a module, which may be a new one."""

    contract: str
    module: str
    code: str

    def __str__(self) -> str:
        return f"{self.module}: {self.code}".replace("\n", " ")


OFFENCES = [
    # A module that no layer names, and low modules that reach up: from the top level, in a function, for types alone.
    Offence(LAYERS, "attnzoo.brand_new", ""),
    Offence(LAYERS, "attnzoo.base.recording", "from attnzoo import surgery"),
    Offence(LAYERS, "attnzoo.topk", "def late():\n    import attnzoo.surgery.hosts.families.llama"),
    Offence(LAYERS, "attnzoo.cache.streams", "from attnzoo.base.config import AttentionConfig"),
    Offence(LAYERS, "attnzoo.base.layer", "from attnzoo.variants.mha import MHAAttention"),
    Offence(LAYERS, "attnzoo.surgery.report", "from attnzoo.evaluation.compare import Row"),
    Offence(LAYERS, "attnzoo.variants.eighth", "from attnzoo.surgery import convert"),
    Offence(LAYERS, "attnzoo.models.decoder", "from attnzoo.surgery import convert"),
    Offence(LAYERS, "attnzoo.models.sampling", "from attnzoo.torch_mha import MultiheadAttention"),
    Offence(LAYERS, "attnzoo.variants.eighth", "def late():\n    from attnzoo.models import CausalLM"),
    Offence(LAYERS, "attnzoo.topk", "import attnzoo"),
    Offence(LAYERS, "attnzoo.doctor", "from attnzoo.evaluation.timing import paired"),
    Offence(SURGERY, "attnzoo.surgery.hosts.brand_new", "from attnzoo.surgery.convert import find"),
    Offence(
        SURGERY,
        "attnzoo.surgery.hosts.families.llama",
        "from attnzoo.surgery.replacements.replacement import Replacement",
    ),
    Offence(
        SURGERY, "attnzoo.surgery.hosts.families.known", "def late():\n    from attnzoo.surgery.kinds import KINDS"
    ),
    Offence(SURGERY, "attnzoo.surgery.brand_new", ""),
    Offence(SURGERY, "attnzoo.surgery.convert", "from attnzoo.surgery.files import save"),
    Offence(SURGERY, "attnzoo.surgery.convert", "from attnzoo.surgery.recipes import recipe_of"),
    Offence(SURGERY, "attnzoo.surgery.kinds.reading", "from attnzoo.surgery.convert import convert"),
    Offence(SURGERY, "attnzoo.surgery.transaction", "from attnzoo.surgery.kinds import kind_of"),
    Offence(SURGERY, "attnzoo.surgery.replacements.spec", "from attnzoo.surgery.lowrank.factor import METHODS"),
    Offence(VARIANTS, "attnzoo.variants.eighth", "from attnzoo.variants.moh.layer import MoHAttention"),
    Offence(VARIANTS, "attnzoo.variants.s2.layer", "from attnzoo.variants.landmark import layer as landmark"),
    Offence(VARIANTS, "attnzoo.variants.eighth", "from attnzoo.surgery.replacements import moh"),
    Offence(ORACLES, "attnzoo.oracles.moh", "from attnzoo.variants.moh.router import best"),
    Offence(ORACLES, "attnzoo.oracles.brand_new", "from attnzoo.variants.s2 import layer as s2"),
    Offence(ORACLES, "attnzoo.oracles.s2", "from attnzoo_kernels import BlockLayout"),
    Offence(ORACLES, "attnzoo.oracles.s2", "import attnzoo_kernels.spec.token_rule"),
    Offence(ORACLES, "attnzoo.oracles.mha", "from einops import rearrange"),
    Offence(ORACLES, "attnzoo.oracles.mha", "def late():\n    import numpy"),
    Offence(TRANSFORMERS, "attnzoo.cache.evicting.cache", "import transformers"),
    Offence(TRANSFORMERS, "attnzoo.evaluation.timing", "from transformers import AutoModel"),
    Offence(TRANSFORMERS, "attnzoo.surgery.replacements.brand_new", "from transformers.cache_utils import Cache"),
    Offence(TRANSFORMERS, "attnzoo.surgery.replacements.landmark_tokens", "def late():\n    import transformers"),
    Offence(TRANSFORMERS, "attnzoo.surgery.kinds.replacing", "import transformers"),
    Offence(TRANSFORMERS, "attnzoo.cli.models", "def late():\n    import transformers"),
    Offence(TRANSFORMERS, "attnzoo_kernels.op", "import transformers"),
    Offence(XFORMERS, "attnzoo.evaluation.layer_costs", "import xformers.ops"),
    Offence(XFORMERS, "attnzoo_kernels._triton.block_lists", "from xformers import ops"),
    Offence(TRITON, "attnzoo.doctor", "import triton"),
    Offence(TRITON, "attnzoo_kernels.cpu.blocked", "import triton.language as tl"),
    Offence(KERNELS, "attnzoo_kernels.checks", "from attnzoo.base.config import check_int"),
    Offence(KERNELS, "attnzoo_kernels.brand_new", "def late():\n    import attnzoo"),
    Offence(FACE, "attnzoo.variants.s2.layer", "from attnzoo_kernels.cpu.row_tiles import HeadGroup"),
    Offence(FACE, "attnzoo.variants.eighth", "from attnzoo_kernels.cpu import row_tiles"),
    Offence(FACE, "attnzoo.surgery.replacements.replacement", "import attnzoo_kernels._triton.launch"),
    Offence(FACE, "attnzoo.cli.app", "from attnzoo_kernels.layouts.layout import BlockLayout"),
    Offence(INSIDE, "attnzoo_kernels.brand_new", ""),
    Offence(INSIDE, "attnzoo_kernels.errors", "from attnzoo_kernels.spec.token_rule import TokenRule"),
    Offence(INSIDE, "attnzoo_kernels.spec.token_rule", "from attnzoo_kernels.layouts import entries"),
    Offence(INSIDE, "attnzoo_kernels.layouts.layout", "from attnzoo_kernels.cpu import schedule"),
    Offence(INSIDE, "attnzoo_kernels.runtime.store", "from attnzoo_kernels.spec.call import Call"),
    Offence(INSIDE, "attnzoo_kernels.reference", "from attnzoo_kernels import registration"),
    Offence(INSIDE, "attnzoo_kernels.dispatch", "from attnzoo_kernels import op"),
    Offence(IMPLEMENTATIONS, "attnzoo_kernels.cpu.flash", "from attnzoo_kernels.cpu import blocked"),
    Offence(IMPLEMENTATIONS, "attnzoo_kernels.cpu.blocked", "from attnzoo_kernels.cpu import bf16"),
    Offence(IMPLEMENTATIONS, "attnzoo_kernels._triton.brand_new", "from attnzoo_kernels.reference import attend"),
    Offence(GPU, "attnzoo_kernels._triton.block_lists", "from attnzoo_kernels.runtime.workspace import clear_scratch"),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both packages in a folder of their own, which is where their names lead meanwhile."""
    folder = tmp_path_factory.mktemp("copied")
    for name, package in PACKAGES.items():
        shutil.copytree(package, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.txt"))
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is imported: the linter only asks where a package lies, and would be told where the running one does.
        for name in PACKAGES:
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(folder)
        yield folder


def lint(folder: Path) -> Report:
    config = api.read_configuration(str(ROOT / "pyproject.toml"))
    options = use_cases.UserOptions(**config)
    use_cases._register_built_in_contract_types()
    report = use_cases.create_report(options, cache_dir=str(folder / "cache"))
    assert not report.could_not_run
    return report


def broken(report: Report) -> list[str]:
    return [contract.name for contract, check in report.get_contracts_and_checks() if not check.kept]


def test_the_contracts_hold_and_each_has_an_offence(copied: Path) -> None:
    report = lint(copied)
    assert broken(report) == []
    assert {contract.name for contract, _ in report.get_contracts_and_checks()} == {o.contract for o in OFFENCES}


@pytest.mark.parametrize("offence", OFFENCES, ids=str)
def test_an_offence_breaks_its_contract(copied: Path, offence: Offence) -> None:
    path = copied / f"{offence.module.replace('.', '/')}.py"
    before = path.read_bytes() if path.exists() else None
    path.write_bytes((before or b"") + f"\n\n{offence.code}\n".encode())
    try:
        found = broken(lint(copied))
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert offence.contract in found
