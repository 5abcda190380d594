"""Where the last step of a save fails, what was there is there still."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnzoo.surgery import files


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "model", tmp_path / ".new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "weights").write_text(folder.name)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        files.swap(new, old)
    assert (old / "weights").read_text() == "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new", "model"]
    monkeypatch.setattr(Path, "rename", real)
    files.swap(new, old)
    assert (old / "weights").read_text() == ".new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
