"""The kernels and CUDA: graphs, streams, threads, devices, memory, compilation. ``pytest -m gpu``, no hypothesis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, UnsupportedError, block_sparse_attention, dispatch, selftest
from attnzoo_kernels.errors import KernelError
from attnzoo_kernels.selftest import CaseInputs, CaseSizes
from tests.attnzoo_kernels.gpu.gpu_support import CPU, REASON, find_device

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16
GIB = 1 << 30


@pytest.fixture
def cuda() -> torch.device:
    if find_device().type != "cuda":
        pytest.skip(REASON)
    return torch.device("cuda", torch.cuda.current_device())


def given_on(device: torch.device, case: str = "plain", tokens: int = 1000) -> CaseInputs:
    return selftest.make(case, CaseSizes(1, 8, 2, tokens, 64, 64, 64, 64)).to(DTYPE, device)


def forward(x: CaseInputs, impl: str = "triton") -> Tensor:
    return block_sparse_attention(x.q, x.k, x.v, x.layout, extras=x.extras, impl=impl)


@pytest.mark.parametrize("case", ["decoding", "plain", "window and sink"])
def test_a_captured_graph_replays_what_a_call_computes(case: str, cuda: torch.device) -> None:
    x = given_on(cuda, case)
    # A layout's lists are counted once, outside of the capture.
    forward(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(x)
    for seed in range(3):
        generator = torch.Generator(cuda).manual_seed(seed)
        for tensor in (x.q, x.k, x.v):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=cuda))
        graph.replay()
        assert torch.equal(out, forward(x))


def test_a_layout_may_change_under_a_captured_decoding_step(cuda: torch.device) -> None:
    """Servers choose other blocks each step and replay one graph."""
    x = given_on(cuda, "decoding", 4096)
    index = torch.arange(8, device=cuda, dtype=torch.int32).view(1, 1, 1, 8).expand(1, 2, 1, 8).contiguous()
    layout = BlockLayout.from_indices(index, 1, 64, 1, 4096)
    block_sparse_attention(x.q, x.k, x.v, layout, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = BlockLayout.from_indices(index, 1, 64, 1, 4096)
        out = block_sparse_attention(x.q, x.k, x.v, made, impl="triton")
    for step in range(3):
        index.copy_((index + 7 * step + 1) % 64)
        graph.replay()
        fresh = BlockLayout.from_indices(index.clone(), 1, 64, 1, 4096)
        assert torch.equal(out, block_sparse_attention(x.q, x.k, x.v, fresh, impl="triton"))


def test_a_capture_that_would_have_to_read_back_says_so(cuda: torch.device) -> None:
    # Enough rows for any device: with fewer, lists would be cut and read as they are, and nothing read back.
    x = given_on(cuda, tokens=4000)
    fresh = BlockLayout.dense(64, 64, 4000, 4000, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedError, match="captured"), torch.cuda.graph(graph):
        block_sparse_attention(x.q, x.k, x.v, fresh, impl="triton")
    torch.cuda.synchronize(cuda)
    assert torch.equal(forward(x), forward(x))


def test_another_current_device_changes_nothing(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x = given_on(torch.device("cuda", 1))
    with torch.cuda.device(1):
        expected = selftest.solve(x, "triton", DTYPE)
    with torch.cuda.device(0):
        found = selftest.solve(x, "triton", DTYPE)
    assert all(torch.equal(found[name], y) for name, y in expected.items())


def test_a_stream_of_its_own_waits_for_nobody_else(cuda: torch.device) -> None:
    """Inputs are written late on a side stream: a launch on another one would read zeros."""
    x = given_on(cuda)
    expected = selftest.solve(x, "triton", DTYPE)
    late = [torch.zeros_like(y) for y in (x.q, x.k, x.v)]
    stream = torch.cuda.Stream(cuda)
    torch.cuda.synchronize(cuda)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, (x.q, x.k, x.v), strict=True):
            target.copy_(source)
        found = selftest.solve(CaseInputs(late[0], late[1], late[2], x.layout, True, x.extras), "triton", DTYPE)
    torch.cuda.synchronize(cuda)
    assert all(torch.equal(found[name], y) for name, y in expected.items())


def test_threads_get_what_one_thread_gets(cuda: torch.device) -> None:
    cases = ("plain", "window and sink", "gate keys", "rotary origins")
    given = {case: given_on(cuda, case) for case in cases}
    expected = {case: selftest.solve(x, "triton", DTYPE) for case, x in given.items()}
    failed: list[str] = []

    def work(case: str) -> None:
        for _ in range(5):
            found = selftest.solve(given[case], "triton", DTYPE)
            if not all(torch.equal(found[name], y) for name, y in expected[case].items()):
                failed.append(case)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_nothing_is_compiled_for_new_lengths_and_layouts(cuda: torch.device) -> None:
    from bench.gpu.cells import Cell
    from bench.gpu.run import recompilations

    found = recompilations(Cell("recompilations", 64, 4096, 0.3, 8, 4, 64), cuda)
    assert found == {"recompilations": 0, "pairs": 50}


def test_compiled_models_run_it_in_one_graph_at_any_length(cuda: torch.device) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
        return block_sparse_attention(q, k, v, layout, impl="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (200, 333, 512):
        x = given_on(cuda, tokens=tokens)
        torch.testing.assert_close(compiled(x.q, x.k, x.v, x.layout), forward(x) * 2, rtol=0, atol=0)


def needs_memory(gib: float, device: torch.device) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < gib * GIB:
        pytest.skip(f"{gib} GiB of memory are not free")


def test_offsets_beyond_31_bits_within_a_head(cuda: torch.device) -> None:
    """Keys of 4.5 GB: the blocks that are read lie at the end."""
    needs_memory(12, cuda)
    slots = (1 << 25) + (1 << 21)
    k, v = (torch.zeros(1, 1, slots, 64, dtype=torch.float16, device=cuda) for _ in range(2))
    assert k.numel() > 1 << 31
    tail = 1024
    generator = torch.Generator(cuda).manual_seed(0)
    for x in (k, v):
        x[:, :, -tail:] = torch.randn(1, 1, tail, 64, generator=generator, device=cuda)
    q = torch.randn(1, 4, 1, 64, generator=generator, device=cuda).half()
    blocks = torch.arange(slots // 128 - tail // 128, slots // 128, device=cuda).view(1, 1, 1, -1)
    far = BlockLayout.from_indices(blocks, 1, 128, 1, slots)
    near = BlockLayout.dense(1, 128, 1, tail, device=cuda)
    expected = block_sparse_attention(q, k[:, :, -tail:], v[:, :, -tail:], near, impl="triton")
    torch.testing.assert_close(block_sparse_attention(q, k, v, far, impl="triton"), expected, rtol=2e-3, atol=2e-3)


def test_offsets_beyond_31_bits_between_heads(cuda: torch.device) -> None:
    """Heads of a packed tensor that lie 4.5 GB apart, forward and gradients."""
    needs_memory(24, cuda)
    rows = 512
    storage = torch.zeros((1 << 31) + (1 << 28), dtype=torch.float16, device=cuda)
    generator = torch.Generator(cuda).manual_seed(0)
    apart = (2, rows, 64)
    views = []
    for i in range(3):
        view = storage.as_strided((1, *apart), (0, 1 << 31, 64, 1), i * rows * 64)
        views.append(view.copy_(torch.randn(1, *apart, generator=generator, device=cuda)))
    layout = BlockLayout.window(64, 64, rows, rows, window=200, device=cuda)
    far = selftest.solve(CaseInputs(views[0], views[1], views[2], layout, True, Extras()), "triton", torch.float16)
    close = [x.contiguous() for x in views]
    near = selftest.solve(CaseInputs(close[0], close[1], close[2], layout, True, Extras()), "triton", torch.float16)
    assert all(torch.equal(far[name], y) for name, y in near.items())


def test_seventy_thousand_heads(cuda: torch.device) -> None:
    """More programs than a grid's second axis may have."""
    generator = torch.Generator(cuda).manual_seed(0)
    q, k, v = (torch.randn(70_000, 1, 16, 16, generator=generator, device=cuda) for _ in range(3))
    layout = BlockLayout.dense(16, 16, 16, 16, device=cuda)
    out = block_sparse_attention(q, k, v, layout, impl="triton")
    some = slice(69_990, 70_000)
    expected = block_sparse_attention(
        q[some].double().cpu(), k[some].double().cpu(), v[some].double().cpu(), layout.to(CPU), impl="reference"
    )
    torch.testing.assert_close(out[some].double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def little_memory(cuda: torch.device) -> Iterator[torch.device]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(cuda) + GIB) / total), cuda)
    yield cuda
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_running_out_of_memory_is_not_swallowed(impl: str, little_memory: torch.device) -> None:
    q = torch.zeros(1, 1, 1, 64, dtype=DTYPE, device=little_memory).expand(1, 64, 1 << 18, 64)
    k = torch.zeros(1, 1, 128, 64, dtype=DTYPE, device=little_memory)
    layout = BlockLayout.dense(128, 128, 1 << 18, 128, device=little_memory)
    with pytest.raises(torch.OutOfMemoryError):
        block_sparse_attention(q, k, k, layout, causal=False, impl=impl)


@pytest.fixture
def forgetful() -> Iterator[None]:
    dispatch._failed.clear()
    dispatch._warned.clear()
    yield
    dispatch._failed.clear()
    dispatch._warned.clear()


def failing(kind: type[Exception], *arguments: object) -> Callable[..., None]:
    def run(*_: object, **__: object) -> None:
        raise kind(*arguments)

    return run


@pytest.mark.usefixtures("forgetful")
def test_a_kernel_that_fails_is_named_once_and_not_tried_again(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnzoo_kernels._triton import launch

    x = given_on(cuda)
    right = forward(x, "blocked")
    error = ("block_sparse_attention: no registers left", ("triton: no registers left",))
    monkeypatch.setattr(launch, "run", failing(KernelError, *error))
    with pytest.raises(UnsupportedError, match="no registers left"):
        forward(x, "triton")
    with pytest.warns(RuntimeWarning, match="no registers left"):
        assert torch.equal(forward(x, "auto"), right)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="no registers left"):
        forward(x, "triton")


@pytest.mark.usefixtures("forgetful")
def test_memory_that_runs_out_in_a_launch_is_not_taken_for_a_bad_kernel(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnzoo_kernels._triton import launch

    monkeypatch.setattr(launch, "run", failing(torch.OutOfMemoryError, "tried to allocate"))
    x = given_on(cuda)
    for impl in ("auto", "triton"):
        with pytest.raises(torch.OutOfMemoryError):
            forward(x, impl)
    assert not dispatch._failed
