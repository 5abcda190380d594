r"""DuoAttention: some KV heads hold everything, the others sinks and a window.

Source: Xiao et al. 2024, *DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads*
(arXiv:2410.10819); code: mit-han-lab/duo-attention.

A gate in [0, 1] for each KV head says how much the head needs what is far; those with the largest gates hold
everything. The others follow :mod:`attnzoo.cache.policies.streaming`.

Departures: prompts are streamed as well, by the block rule, so that any split gives the same result; the published code
lets a prompt's first chunk read everything, and counts the window differently in training and in decoding. Equal gates
are ordered by layer and head; the published code breaks ties with noise that no seed fixes.

Letters: L layers, G KV heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from attnzoo.cache.policies.full_heads import check_heads, full_heads, heads_of_layer
from attnzoo.cache.policies.streaming import Streaming
from attnzoo.cache.retention import Retention
from attnzoo.reporting.warn import warn_caller
from attnzoo_kernels.errors import ConfigError

GATES = "full_attention_heads.tsv"
SETTINGS = "config.json"

KINDS: Mapping[str, float] = {"induction": 6 / 7, "echo": 1 / 7}
"""Which scores choose the heads that hold everything, and which share of them each."""


@runtime_checkable
class HeadScoring(Protocol):
    """What knows how much each head scores, by kinds of score."""

    @property
    def kv_heads(self) -> int:
        """G."""

    def __getitem__(self, kind: str) -> Tensor:
        """Scores of query heads ``[L, H]``."""

    def kv(self, kind: str) -> Tensor:
        """Scores of KV heads ``[L, G]``."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Duo(Streaming, name="duo"):
    """Everything for some KV heads, sinks and a window for the others.

    Attributes:
        full: Which KV heads hold everything, bool ``[L, G]``; ``[G]`` is one layer's.

    Raises:
        ConfigError: If ``full`` is none such, or another setting does not fit.
    """

    full: Tensor = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "full", full_heads(self.full))

    @classmethod
    def from_scores(
        cls, scores: HeadScoring, keep: float = 0.25, *, kinds: Mapping[str, float] | None = None, **settings: Any
    ) -> Self:
        """The heads that score most, chosen in an order that nothing but the scores decides.

        Args:
            scores: Scores of every KV head by kind.
            keep: Share of all KV heads that hold everything, rounded down to heads.
            kinds: Which scores, and which share of the heads each chooses: the first takes what rounding leaves, each
                other one the best of those that are not chosen yet. By default most by induction and about one in
                seven by echo.
            **settings: Of the policy.

        Raises:
            ConfigError: If a share is none, or scores are no finite ``[L, G]``.
        """
        _check_share("keep", keep)
        kinds = dict(KINDS if kinds is None else kinds)
        if not kinds or any(isinstance(part, bool) or not part > 0 for part in kinds.values()):
            raise ConfigError(f"kinds: expected kinds of scores with positive shares, got {kinds}")
        found = {kind: scores.kv(kind) for kind in kinds}
        first, *others = kinds
        count = math.floor(keep * found[first].numel() + 1e-9)
        parts = {kind: round(count * kinds[kind] / sum(kinds.values())) for kind in others}
        full = top_heads(found[first], count - sum(parts.values()))
        for kind in others:
            full = top_heads(found[kind], parts[kind], full)
        return cls(full, **settings)

    @classmethod
    def load(cls, folder: str | Path, sparsity: float | None = None, *, block: int = 64, **settings: Any) -> Self:
        """The policy of a folder in the format of the published gates: ``config.json`` and the gates' table.

        Args:
            folder: Where they lie; nothing is fetched.
            sparsity: Share of the KV heads that stream. As in the published code, a head holds everything where its
                gate reaches the quantile at this share; ``None`` takes gates of a half and above.
            block: Tokens in a block. The folder's sink and window are rounded up to blocks, with a warning.
            **settings: Of the policy, in place of what the folder says.

        Raises:
            ConfigError: If a file is missing or damaged, a gate is no finite number, rows are of different lengths, or
                a number does not fit.
        """
        folder = Path(folder)
        given = _read_settings(folder / SETTINGS)
        gates = read_gates(folder)
        if sparsity is None:
            full = gates >= 0.5
        else:
            _check_share("sparsity", sparsity)
            # As many as are not below the quantile that lies at this share of the way from the least to the most.
            below = gates.numel() if sparsity >= 1 else math.ceil(sparsity * (gates.numel() - 1) - 1e-9)
            full = top_heads(gates, gates.numel() - below)
        for name, key in (("sink", "sink_size"), ("window", "recent_size")):
            if name not in settings:
                settings[name] = _in_blocks(folder, key, given, block)
        return cls(full, block=block, **settings)

    def save(self, folder: str | Path) -> Path:
        """Writes the folder that :meth:`load` reads: gates of 1 for heads that hold everything, and 0.

        Raises:
            OSError: If the disk refuses.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_gates(folder, self.full.double())
        config = {
            "sink_size": self.sink,
            "recent_size": self.window,
            "deploy_sink_size": None,
            "deploy_recent_size": None,
        }
        (folder / SETTINGS).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        return folder

    def _said(self) -> list[str]:
        return [f"{int(self.full.sum())} of {self.full.numel()} KV heads full", *super()._said()]

    def of_layer(self, layer: int) -> Self:
        """The policy of one layer."""
        return replace(self, full=heads_of_layer(self.full, layer))

    def check(self, layers: int, kv_heads: int) -> None:
        """Raises unless there is a bool for every KV head of every layer."""
        check_heads(self.full, layers, kv_heads)

    def retention(self, kv_heads: int) -> Retention:
        """Everything for some heads, the sink's blocks and the near ones for the others, of one layer."""
        self.check(1, kv_heads)
        return self._retention(tuple(self.full[0].tolist()))


def top_heads(scores: Tensor, count: int, taken: Tensor | None = None) -> Tensor:
    """The heads of the largest scores; of equal ones the first, by layer and head.

    Args:
        scores: ``[L, G]``.
        count: How many.
        taken: bool ``[L, G]``, heads that are chosen already, beside which ``count`` more are.

    Returns:
        bool ``[L, G]``, those of ``taken`` among them.

    Raises:
        ConfigError: If scores are no finite numbers ``[L, G]``.
    """
    if scores.dim() != 2 or not bool(scores.isfinite().all()):
        raise ConfigError(f"scores: expected finite numbers [L, G], got {scores.dtype} {list(scores.shape)}")
    values = scores.detach().double().cpu()
    chosen = torch.zeros(values.shape, dtype=torch.bool, device="cpu") if taken is None else taken.clone()
    order = values.masked_fill(chosen, -torch.inf).flatten().argsort(descending=True, stable=True)
    chosen.view(-1)[order[:count]] = True
    return chosen


def read_gates(folder: str | Path) -> Tensor:
    """The gates of a published folder, fp64 ``[L, G]`` in [0, 1].

    Raises:
        ConfigError: If there is no such table of finite numbers.
    """
    file = Path(folder) / GATES
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [[float(word) for word in line] for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected a table of gates, a line for each layer: {error}") from error
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise ConfigError(f"{file}: expected as many gates in each line, got {widths or 'no line'}")
    gates = torch.tensor(rows, dtype=torch.float64, device="cpu")
    if not bool(gates.isfinite().all()):
        layer, head = (~gates.isfinite()).nonzero()[0].tolist()
        raise ConfigError(f"{file}: expected finite gates, got {rows[layer][head]} in line {layer + 1}")
    return gates.clamp(0, 1)


def write_gates(folder: str | Path, gates: Tensor) -> None:
    """Writes gates ``[L, G]`` as the published table has them."""
    lines = ("\t".join(f"{gate:.18e}" for gate in row) for row in gates.tolist())
    (Path(folder) / GATES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the JSON beside a table of gates: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _in_blocks(folder: Path, key: str, given: Mapping[str, Any], block: int) -> int:
    """Tokens of a folder's setting, of its value for deployment where it has one, up to whole blocks."""
    value = given.get(f"deploy_{key}")
    if value is None:
        value = given.get(key)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{folder / SETTINGS}: {key}: expected a number of tokens, got {value!r}")
    whole = -(-value // max(block, 1)) * block
    if whole != value:
        warn_caller(f"{folder / SETTINGS}: {key} of {value} tokens becomes {whole}, whole blocks of {block}")
    return whole


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a share from 0 to 1, got {value!r}")
