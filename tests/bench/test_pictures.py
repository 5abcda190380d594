"""Stored pictures are drawn anew by one command, which knows them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from bench import pictures


def test_the_command_knows_every_stored_picture_and_its_results() -> None:
    assert {path.stem for path in pictures.RESULTS.glob("*.png")} == set(pictures.PICTURES)
    assert {path.stem for path in pictures.PAGES.glob("*.png")} == set(pictures.ON_PAGES)
    for name in pictures.PICTURES:
        assert (pictures.RESULTS / f"{name}.json").is_file(), name


@pytest.mark.parametrize("name", ["cpu-amx", "moh-amx", "smollm2-longheads", "trained"])
def test_a_stored_picture_is_drawn_of_its_results(name: str, tmp_path: Path) -> None:
    pictures.main([name], tmp_path / "new")
    assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_another_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="got smollm3"):
        pictures.main(["smollm3"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
