"""The tables of README and docs, written from the results that are committed: ``python -m bench.pages``.

A block stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.evaluation import compare_report
from bench import choosing, compiled, models
from bench.crossover import report
from bench.trained import report as trained_report
from bench.trained import results as trained_results
from bench.walks import report as walks_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def blocks() -> dict[tuple[str, str], list[str]]:
    """The lines of each block, by its page and its name."""
    demo = compare_report.read((RESULTS / "smollm2-demo.json").read_text(encoding="utf-8"))
    curves, where = report.read((RESULTS / "crossover.json").read_text(encoding="utf-8"))
    from_where = f"Measured at {report.where_from(where)}; `bench/results/crossover.md` has all lengths."
    found = {
        ("README.md", "demo"): compare_report.tables(demo),
        ("README.md", "crossover"): [*report.summary(curves), "", f"{report.CAPTION} {from_where}"],
    }
    found["docs/choosing.md", "crossover"] = [*report.summary(curves), "", f"{report.CAPTION} {from_where}"]
    found |= {("docs/choosing.md", name): lines for name, lines in choosing.blocks(RESULTS).items()}
    found["docs/howto/compile.md", "compiled"] = compiled.summary(RESULTS / "compiled-step.json")
    found["docs/models.md", "models"] = models.page(*models.read(RESULTS / "models.json"))
    found["docs/examples.md", "walks"] = walks_report.table(walks_report.read(RESULTS / "walks.json"))
    trained = trained_results.read(RESULTS / "trained.json")
    found["docs/surgery.md", "trained"] = trained_report.summary(trained)
    for variant in dict.fromkeys(curve.layer.partition(":")[0] for curve in curves):
        own = report.of_variant(curves, variant)
        found[f"docs/variants/{variant}.md", "crossover"] = [*own, f"Measured at {report.where_from(where)}."]
    return found


def replaced(text: str, name: str, lines: list[str]) -> str:
    """A page with other lines in a block.

    Raises:
        ValueError: If the page has no such block, or more than one.
    """
    begin = f"<!-- {name} -->\n"
    end = f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{name}: expected one block between {begin.strip()} and {end}, got {text.count(begin)}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    body = "\n".join(lines)
    return f"{before}{begin}\n{body}\n\n{end}{after}"


def main(
    out: Annotated[Path, typer.Option(help="The folder that README.md and docs/ lie in.")] = ROOT,
) -> None:
    """Writes the tables of README and docs anew, from bench/results."""
    for (page, name), lines in blocks().items():
        path = out / page
        path.write_text(replaced(path.read_text(encoding="utf-8"), name, lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
