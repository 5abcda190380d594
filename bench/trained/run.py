"""Training models, or taking them from where they were kept, and going through what is missing of their rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.trained.healing import Healing
from bench.trained.hosts import HOSTS, MHA, HostSpec, ModelSizes, build
from bench.trained.measure import HostTable
from bench.trained.results import TrainedResults
from bench.trained.texts import Texts, texts
from bench.trained.training import Schedule, train

MHA_ROW = "MHA"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TrainedSetting:
    """What is trained and measured.

    Attributes:
        sizes: Of the models; those whose heads are merged have half as many blocks.
        training: From random weights; half as long where there are half as many blocks.
        healing: Further training.
        most: Windows that are scored, at most; all where ``None``.
    """

    sizes: ModelSizes
    training: Schedule
    healing: Schedule
    most: int | None = None

    def about(self) -> dict[str, Any]:
        """As results tell it."""
        return {
            "sizes": asdict(self.sizes),
            "training": asdict(self.training),
            "further training": asdict(self.healing),
            "windows": self.most or "all",
        }


def setting_for(seconds: float, *, quick: bool) -> TrainedSetting:
    """The setting of the committed results with so much CPU time for each model, or of a few steps."""
    if quick:
        return TrainedSetting(
            sizes=ModelSizes(width=32, heads=4, layers=2, context=64),
            training=Schedule(steps=3, length=64, batch=2),
            healing=Schedule(steps=2, length=32, batch=2, rate=1e-3),
            most=2,
        )
    sizes = ModelSizes()
    return TrainedSetting(
        sizes=sizes,
        training=Schedule(seconds=seconds, length=sizes.context),
        healing=Schedule(steps=200, length=sizes.context // 2, rate=1e-3),
    )


class TrainedRun:
    """Goes through what was asked for, and keeps every row.

    Args:
        setting: What is trained and measured.
        results: What is known; it is filled.
        keep: Called after every row.
        models: A folder for trained weights.
        progress: Told how far it is.
    """

    def __init__(
        self,
        setting: TrainedSetting,
        results: TrainedResults,
        *,
        keep: Callable[[], None],
        models: Path | None = None,
        progress: Progress,
    ) -> None:
        self.setting = setting
        self.results = results
        self.keep = keep
        self.models = models
        self.progress = progress
        self.texts: Texts = texts()

    def convert(self, name: str) -> None:
        """All conversions of one model; whole, or as it was, since certificates come first."""
        if name in self.results.rows:
            return
        spec = HOSTS[name]
        model = self._trained(name, spec, 0)
        context = self.setting.sizes.context
        table = HostTable(name, model, self.texts, context=context, any_length=spec.any_length, most=self.setting.most)
        self.results.rows[name] = list(table.rows(self.progress))
        self.keep()

    def heal(self, seed: int) -> None:
        """All conversions of one model of as many KV heads as query heads, trained further."""
        rows = self.results.healed.setdefault(str(seed), [])
        model = self._trained(f"{MHA_ROW}, seed {seed}", MHA, seed)
        healing = Healing(seed, model, self.texts, self.setting.healing, self.setting.most)
        for row in healing.rows({row.name for row in rows}, self.progress):
            rows.append(row)
            self.keep()

    def _trained(self, name: str, spec: HostSpec, seed: int) -> Any:
        """A model from the folder, if there is one that was trained so, or trained now."""
        sizes = self.setting.sizes
        schedule = replace(self.setting.training, seed=seed)
        if spec is MHA:
            sizes = replace(sizes, layers=sizes.layers // 2)
            schedule = replace(schedule, seconds=None if schedule.seconds is None else schedule.seconds / 2)
        model = build(spec, sizes, seed)
        asked = {"sizes": asdict(sizes), "schedule": asdict(schedule)}
        found = self._kept(name, model, asked)
        if found is None:
            trained = train(model, self.texts, schedule, progress=self.progress, name=f"training {name}")
            parameters = sum(p.numel() for p in model.parameters())
            found = {"says": spec.says, "parameters": parameters, **asdict(trained)}
            self._store(name, model, {"asked": asked, "training": found})
        self.results.trainings[name] = found
        return model

    def _kept(self, name: str, model: Any, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Loads what was kept, where it was trained as it is asked for now."""
        from safetensors.torch import load_model

        if self.models is None or not (self.models / f"{name}.json").is_file():
            return None
        data = json.loads((self.models / f"{name}.json").read_text(encoding="utf-8"))
        if data["asked"] != asked:
            return None
        load_model(model, str(self.models / f"{name}.safetensors"))
        model.eval()
        found: dict[str, Any] = data["training"]
        return found

    def _store(self, name: str, model: Any, data: dict[str, Any]) -> None:
        from safetensors.torch import save_model

        if self.models is None:
            return
        self.models.mkdir(parents=True, exist_ok=True)
        save_model(model, str(self.models / f"{name}.safetensors"))
        (self.models / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
