"""The jobs, the programs that do them, and why a package has none."""

from __future__ import annotations

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALKS = ROOT / "examples" / "walks"
PEERS = Path(__file__).resolve().parent / "peers"
PACKAGES = ("attnzoo", "x-transformers", "peft")
SPACE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a user wants done.

    Attributes:
        title: In a line.
        programs: The program of a package that does it, by the package's name.
        reasons: Why the other packages have none.
    """

    title: str
    programs: dict[str, Path]
    reasons: dict[str, str]


JOBS = (
    Job(
        title="a layer in one's own model, trained, decoded with a cache",
        programs={"attnzoo": WALKS / "1_layer.py", "x-transformers": PEERS / "x_transformers_layer.py"},
        reasons={"peft": "has no layers of attention"},
    ),
    Job(
        title="SmolLM2 with other attention: converted, compared, saved, loaded, generating",
        programs={"attnzoo": WALKS / "2_smollm2.py"},
        reasons={
            "x-transformers": "reads no checkpoints of other packages",
            "peft": "adds adapters; the attention stays what it was",
        },
    ),
    Job(
        title="a variant of one's own, with cache and laws",
        programs={"attnzoo": WALKS / "3_variant.py"},
        reasons={
            "x-transformers": "has options of one class, and no place for another variant",
            "peft": "has no variants of attention",
        },
    ),
    Job(
        title="a cache policy in generate()",
        programs={"attnzoo": WALKS / "4_policy.py"},
        reasons={
            "x-transformers": "generates with models of its own alone",
            "peft": "leaves caches to the model",
        },
    ),
    Job(
        title="a head taken away, tried, folded into the weights",
        programs={"attnzoo": WALKS / "5_head.py", "peft": PEERS / "peft_head.py"},
        reasons={"x-transformers": "edits no models of other packages"},
    ),
)


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank, nor a comment, nor a docstring; checks count."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SPACE:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - docstrings)
