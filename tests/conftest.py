"""Settings that hold for every test: how hard hypothesis searches, how many threads run, which numbers are drawn."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Inductor finds compiled graphs by the names of their operations alone: one made for an older schema would be run.
_registration = Path(__file__).resolve().parents[1] / "kernels" / "attnzoo_kernels" / "registration.py"
_schema = hashlib.sha256(_registration.read_bytes()).hexdigest()[:12]
# Neither is code for one class of CPU for another, which a variable may ask for.
_processor = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/attnzoo-inductor-{_schema}-{_processor}")
if not torch.cuda.is_available():
    # Before anything imports triton, which reads it once: the kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hypothesis
except ModuleNotFoundError:  # a GPU machine may lack it, and tests/attnzoo_kernels/gpu/test_gpu.py does not need it
    hypothesis = None  # type: ignore[assignment]

if hypothesis is not None:
    _SLOW_MACHINES_ARE_NO_BUG = {
        "deadline": None,
        "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
        "print_blob": True,
    }
    hypothesis.settings.register_profile("dev", max_examples=30, derandomize=True, **_SLOW_MACHINES_ARE_NO_BUG)
    hypothesis.settings.register_profile("ci", max_examples=100, derandomize=True, **_SLOW_MACHINES_ARE_NO_BUG)
    hypothesis.settings.register_profile("thorough", max_examples=1000, **_SLOW_MACHINES_ARE_NO_BUG)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no collection of garbage, of which compilers ask many, looks at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
