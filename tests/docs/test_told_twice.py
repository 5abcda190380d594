"""What a page repeats from elsewhere is the same there: papers, extras, the citation."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")
CITING = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")


def test_every_paper_in_the_code_can_be_cited_once() -> None:
    sources = [*(ROOT / "attnzoo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    named = {paper for source in sources for paper in PAPER.findall(source.read_text(encoding="utf-8"))}
    cited = re.findall(r"eprint = \{(.+)\},", CITING)
    assert sorted(cited) == sorted(named)
    assert re.findall(r"arxiv\.org/abs/([\d.]+)\}", CITING) == cited


def test_every_key_of_a_table_is_an_entry_and_every_entry_is_whole() -> None:
    keys = re.findall(r"^@\w+\{(\w+),$", CITING, re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert sorted(re.findall(r"\| `(\w+)` \|$", CITING, re.MULTILINE)) == sorted(set(keys) - {"attnzoo"})
    for entry in re.findall(r"^@.*?^\}$", CITING, re.MULTILINE | re.DOTALL):
        signs = Counter(entry)
        assert signs["{"] == signs["}"]
        assert {"title", "author"} <= set(re.findall(r"^  (\w+) = \{", entry, re.MULTILINE))


def test_the_page_and_the_file_cite_the_same() -> None:
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entry = re.search(r"^@software\{.*?^\}$", CITING, re.MULTILINE | re.DOTALL)
    assert entry is not None
    for value in (file["title"], file["version"], file["license"], file["authors"][0]["name"]):
        assert str(value) in entry[0]


def test_the_table_of_extras_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    told = {extra: set(packages.strip().split(", ")) for extra, packages in rows}
    given = {
        extra: {re.split(r"[><=\[]", package)[0] for package in packages} - {"attnzoo"}
        for extra, packages in project["optional-dependencies"].items()
    }
    assert told == given
