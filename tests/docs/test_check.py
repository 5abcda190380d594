"""The check of the built pages sees what it is there for, on small sites with one fault each."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnzoo_docs import check
from attnzoo_docs.built import read
from attnzoo_docs.questions import QUESTIONS, Question

WHOLE = {
    "index.html": '<nav><a href="menu.html">m</a></nav><article><a href="sub/a.html#part">a</a></article>',
    "menu.html": '<link rel="stylesheet" href="_static/s.css?v=1"><article><p>Here it   is.</p></article>',
    "sub/a.html": '<article><h2 id="part">Part<a class="headerlink" href="#part">#</a></h2>'
    '<a href="../menu.html">m</a><a href="https://arxiv.org/abs/1706.03762">p</a></article>',
    "_static/s.css": "a { background: url(data:image/png;base64,AA) } @font-face { src: url('f.woff2') }",
    "_static/f.woff2": "",
}
ANSWERED = Question("Where?", ("sub/a.html#part", "menu.html"), "Here it is.")


def faults(where: Path, *questions: Question, **changed: str) -> list[str]:
    """What is found in the whole site, with some of its files changed."""
    files = {**WHOLE, **{name.replace("__", "/").replace("_html", ".html"): text for name, text in changed.items()}}
    for name, text in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text, encoding="utf-8")
    paths = {file.relative_to(where).as_posix() for file in where.rglob("*") if file.is_file()}
    return check.faults(read(where), paths, questions)


def test_a_whole_site_has_no_fault(tmp_path: Path) -> None:
    assert faults(tmp_path, ANSWERED) == []


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<a href="nowhere.html">x</a>', "nowhere.html leads nowhere"),
        ('<a href="sub/a.html#else">x</a>', "sub/a.html#else has no such anchor"),
        ('<a href="#else">x</a>', "#else has no such anchor"),
        ('<a href="../index.html">x</a>', "../index.html leads nowhere"),
        ('<a href="https://arxiv">x</a>', "https://arxiv is no whole address"),
        ('<a href="https://arxiv.org/abs/1(2">x</a>', "https://arxiv.org/abs/1(2 is no whole address"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="//cdn.example.org/x.css">', "loads //cdn.example.org/x.css"),
        ('<img src="gone.png">', "loads gone.png"),
        ('<p style="background: url(https://example.org/p.png)">', "loads https://example.org/p.png"),
        (r"<math><mi>\mathbf</mi></math>", r"a formula has \mathbf"),
        (r"<math><mo>\(</mo></math>", "a formula has \\"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, page: str, fault: str) -> None:
    assert faults(tmp_path, menu_html=page) == [f"menu.html: {fault}"]


def test_what_a_style_sheet_fetches_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "b.css").write_text("@import 'https://example.org/b.css';", encoding="utf-8")
    assert faults(tmp_path) == ["b.css: loads https://example.org/b.css"]


def test_a_page_that_is_too_large_is_found(tmp_path: Path) -> None:
    assert faults(tmp_path, menu_html="<p>" + "x" * check.LARGEST) == ["menu.html: 300,003 bytes, 300,000 is the most"]


@pytest.mark.parametrize(
    ("clicks", "answer", "why"),
    [
        # A link in a menu counts as little as one that is not there.
        (("menu.html",), "Here it is.", "index.html has no link to menu.html in its text"),
        (("sub/a.html#part", "index.html"), "", "sub/a.html has no link to index.html in its text"),
        (("sub/a.html#part", "menu.html"), "There it is.", "menu.html does not say 'There it is.'"),
        (("sub/a.html#part", "menu.html", "menu.html"), "", "takes 3 clicks"),
        # The sign beside a heading is no click.
        (("sub/a.html#part", "sub/a.html#part"), "", "sub/a.html has no link to sub/a.html#part in its text"),
    ],
)
def test_a_question_without_its_answer_is_found(tmp_path: Path, clicks: tuple[str, ...], answer: str, why: str) -> None:
    assert faults(tmp_path, Question("Where?", clicks, answer)) == [f"Where? {why}"]


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults(tmp_path)
    assert check.main([str(tmp_path), "--outside"]) == 0
    assert capsys.readouterr().out == "https://arxiv.org/abs/1706.03762\n"
    (tmp_path / "menu.html").unlink()
    assert check.main([str(tmp_path)]) == 1
    assert "sub/a.html: ../menu.html leads nowhere" in capsys.readouterr().err


def test_there_are_ten_questions_and_none_takes_more_than_two_clicks() -> None:
    assert len(QUESTIONS) >= 10
    assert all(1 <= len(question.clicks) <= check.MOST_CLICKS and question.answer for question in QUESTIONS)
    assert len({question.asked for question in QUESTIONS}) == len(QUESTIONS)
