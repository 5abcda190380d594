"""What strangers ask, and the clicks from the start page that answer it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        asked: As it is asked.
        clicks: Pages, with anchors where there are some, each linked in the text of the one before; the first in that
            of the start page.
        answer: What the last page says.
    """

    asked: str
    clicks: tuple[str, ...]
    answer: str


QUESTIONS: tuple[Question, ...] = (
    Question("Can I convert GPT-2?", ("families.html",), "GPT-2"),
    Question(
        "How do I mask padding from Hugging Face?",
        ("howto/masks.html#from-hugging-face-to-key-padding",),
        "The two are inverses of each other",
    ),
    Question("What does S2 cost at 4k?", ("variants/s2.html#what-it-costs",), "4,096"),
    Question("How do I keep only half of the cache?", ("policies/index.html#budgets",), "share="),
    Question("Does it run without a GPU?", ("install.html",), "attnzoo is pure Python"),
    Question("How do I add my own variant?", ("adding-a-variant.html",), "And lines in"),
    Question("How do I save a converted model?", ("surgery.html#saving",), "surgery.save(model, folder)"),
    Question(
        "Which paper is MoH, and how does this differ from its code?",
        ("variants/index.html", "variants/moh.html"),
        "SkyworkAI/MoH",
    ),
    Question("How do I cite it?", ("citing.html",), "@software{attnzoo,"),
    Question("What happens under torch.compile?", ("howto/compile.html",), "fullgraph=True works for every variant"),
)
