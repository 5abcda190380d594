"""Runs tests one after the other and says of each when it begins and how it ends; pytest alone is needed.

python -m bench.gpu_first.pytest_worker --list NAMES.json FILE...
python -m bench.gpu_first.pytest_worker NAMES.json NEWS.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.gpu_first.pool import POISONED, News

MARK = "gpu and not slow"
COMMON = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", MARK]
MISSING = "pytest is not installed"


def device_problem() -> str:
    """What the device still has to say: an illegal access shows when somebody waits, and then nothing runs any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return " ".join(str(error).strip().splitlines()[:1])
    return ""


class Listing:
    """Writes down which tests there are."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collection_finish(self, session: Any) -> None:
        self._path.write_text(json.dumps([item.nodeid for item in session.items]), encoding="utf-8")


class Reporter:
    """Tells the pool about each test."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._found: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self._found = {"outcome": "passed"}
        self._news.write("begin", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self._found["outcome"] != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(crash.message if crash is not None else report.longrepr)
            text = f"{report.when}:\n{report.longreprtext}"
            self._found = {"outcome": "failed", "reason": " ".join(said.split())[:300], "text": text[-6000:]}
        elif report.skipped:
            longrepr = report.longrepr
            reason = longrepr[2] if isinstance(longrepr, tuple) else longrepr
            self._found = {"outcome": "skipped", "reason": str(reason)}

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        problem = device_problem()
        if problem and self._found["outcome"] != "failed":
            self._found = {"outcome": "failed", "reason": problem}
        self._news.write("end", nodeid, **self._found)
        if problem:
            sys.stdout.flush()
            os._exit(POISONED)


def main(given: list[str]) -> int:
    """Lists tests, or runs those of a file of names."""
    try:
        import pytest
    except ModuleNotFoundError:
        print(MISSING)
        return 3
    if given[0] == "--list":
        return int(pytest.main([*COMMON, "--collect-only", *given[2:]], plugins=[Listing(Path(given[1]))]))
    names = json.loads(Path(given[0]).read_text(encoding="utf-8"))
    return int(pytest.main([*COMMON, *names], plugins=[Reporter(News(Path(given[1])))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
