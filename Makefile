# Every target sets itself up; nothing but Python 3.11 has to be there.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
SOURCES := attnzoo kernels tests docs bench examples
FROM_SOURCE := .:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
TRANSFORMERS_TESTS := $(addprefix tests/attnzoo/surgery/,hosts/test_transformers.py replacements/test_replacements.py test_files.py)

.PHONY: help setup setup-demo demo demo-long test test-oldest test-transformers test-slow test-gpu package check mutants bench-cpu bench-gpu gpu-first gpu-first-kernels fix docs clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## Everything for development, in .venv
	@PYTHON=$(PYTHON) scripts/setup.sh dev

setup-demo:
	@PYTHON=$(PYTHON) scripts/setup.sh cli,hf

demo: setup-demo  ## Convert SmolLM2-135M several ways and compare on real text
	$(BIN)/python -m attnzoo compare smollm2 --preset demo --out out/demo

demo-long: setup-demo  ## The same, and decoding behind 4,096 tokens: longer than the demo may take
	$(BIN)/python -m attnzoo compare smollm2 --preset demo --decode-at 4096 --out out/demo-long

test: setup  ## The test suite; about 18 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu" --doctest-modules attnzoo kernels tests

test-oldest: setup  ## The kernels' tests with the oldest supported triton
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" \
		tests/attnzoo_kernels/triton/test_switches.py

test-transformers: setup  ## Surgery with the older versions of transformers that attnzoo/reporting/versions.py names
	@set -e; for version in $$(PYTHONPATH=.:kernels $(BIN)/python -c "from attnzoo.reporting.versions import TRANSFORMERS; print(*TRANSFORMERS[:-1])"); do \
		python=.venv-transformers-$$version/bin/python; \
		$$python -c "import transformers; assert transformers.__version__ == '$$version', transformers"; \
		echo "transformers $$version"; \
		$$python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(TRANSFORMERS_TESTS); \
	done

test-slow: setup  ## What the suite leaves out: whole grids, mutants inside the suite, exports of everything
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" tests/attnzoo_kernels/triton/test_torture.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow tests

package: setup  ## The wheel and the sdist, in dist/, installed without the source and used; about two minutes
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(BIN)/python -m tests.wheel

mutants: setup  ## Mistakes on purpose: do the tests notice? About half an hour on two cores
	$(BIN)/python -m tests.mutants --jobs $(WORKERS) --json out/mutants.json

check: setup  ## Format, lint, types, import contracts
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy -p attnzoo -p attnzoo_kernels
	PYTHONPATH=.:kernels $(BIN)/lint-imports

bench-cpu: setup  ## The operation beside its peers on this CPU; about ten minutes
	PYTHONPATH=.:kernels $(BIN)/python -m bench.cpu --out out/cpu

# A GPU machine brings its own torch and triton, and often no network: nothing is set up there.
test-gpu:  ## The operation on the GPU against fp64, with the Python that has torch and triton
	PYTHONPATH=$(FROM_SOURCE) $(PYTHON) -m pytest -q -m "gpu and not slow" tests/attnzoo_kernels/gpu/test_gpu.py tests/attnzoo_kernels/gpu/test_gpu_runtime.py

bench-gpu:  ## The kernels beside their peers on the GPU, likewise; goes on where it stopped
	PYTHONPATH=$(FROM_SOURCE) $(PYTHON) -m bench.gpu --out out/gpu

# OUT=folder SECONDS=500 IMPL=reference,blocked,triton CORES=16 KERNELS=archive NAME=files; REHEARSE=1 needs no GPU.
gpu-first: OUT ?= out/gpu-first
gpu-first:  ## Eight minutes on a GPU: self-test, tests, the dearest figures, in one archive; OUT= SECONDS= IMPL= KERNELS=
	PYTHONPATH=$(FROM_SOURCE) $(PYTHON) -m bench.gpu_first --out $(OUT) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(IMPL),--impl $(IMPL)) $(if $(CORES),--cores $(CORES)) $(if $(KERNELS),--kernels $(KERNELS)) \
		$(if $(NAME),--name $(NAME)) $(if $(REHEARSE),--rehearse)

# RECORDER= has torch, and the same triton as PYTHON=, which has the GPU machine's version of Python, and needs no torch.
gpu-first-kernels: RECORDER ?= $(PYTHON)
gpu-first-kernels:  ## Kernels for gpu-first, compiled where there is no GPU; PYTHON= RECORDER= ARCHITECTURE= PARTS=
	PYTHONPATH=$(FROM_SOURCE) $(RECORDER) -m bench.kernel_cache --python $(PYTHON) --out $(or $(OUT),out/kernels.tar.gz) \
		$(if $(ARCHITECTURE),--architecture $(ARCHITECTURE)) $(if $(PARTS),--parts $(PARTS))

fix: setup  ## Format and repair what can be repaired
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: setup  ## The pages, in docs/_build, and whether their links lead somewhere
	rm -rf docs/_build
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	PYTHONPATH=docs/_extensions $(BIN)/python -m attnzoo_docs.check docs/_build

clean:  ## Remove what was built
	rm -rf .venv .venv-* dist out docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
