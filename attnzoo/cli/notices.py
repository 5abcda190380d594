"""Warnings, one line each on stderr."""

from __future__ import annotations

import warnings
from typing import Any

from rich.console import Console
from rich.text import Text


def show_warnings() -> None:
    """From here on a warning is one line, said once: what it says, without the line of code that said it."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            line = Text("attnzoo: warning: ", style="yellow").append(text, style="default")
            Console(stderr=True).print(line, soft_wrap=True, highlight=False)

    warnings.showwarning = show
