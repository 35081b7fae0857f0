# make demo   watch a GPT being pruned, distilled, quantized and exported on this machine's CPU
# make test   lint, types, the documentation and every test: on the GPUs of this machine if it has any, else on its CPU
# make test-gpu   every test on GPUs; fails where there are none. TESTS chooses tests: TESTS="test_code/test_pruner.py"
# make test-slow   the tests that take minutes: interruptions at random moments, many random models, an older processor's arithmetic
# make test-families   every step with a small model of every family; prints the table. FAMILY="mixtral gemma" for some, WRITE=--write for docs/families.md
# make test-serving   vLLM on this machine's CPU serves what is exported; builds build/serving (3.4 GB) when it is missing
# make test-te   Transformer Engine's own layers on this machine's CPU; builds build/te_on_cpu (1 MB) when it is missing
# make test-eval   lm-eval scores what is exported; builds build/eval (95 MB) when it is missing
# make test-across   each supported modelopt reads the checkpoints of the others; TESTS="-k experts" for a part
# make docs   the documentation as a site, build/site/index.html
# make test-compat   the tests on the other supported versions; ROW=nemo-2.6.2 TESTS="test_code/test_pruner.py" for a part, WHOLE=1 for all
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
# Test files that run side by side: as many as cores. Three took no less time on two cores, and more memory.
JOBS ?= 2
SOURCES := nemo nemo_modelopt_dropin nemo_modelopt_cli scripts test_code benchmarks examples
PAGES := README.md CONTRIBUTING.md CHANGELOG.md docs
# What scripts/check_prose.py reads.
PROSE := $(PAGES) $(SOURCES)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# `setup` leaves it to the first import to compile a module; each later one would compile it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-gpu test-slow test-families test-serving test-te test-eval test-across test-compat lint types docs bench clean

setup: $(READY)

# Rebuilt when the pins change. Modules are compiled when they are first imported: few of those that are installed are.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.10, 3.11 or 3.12 is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip check
	@touch $(READY)

demo: $(READY)
	$(BIN)/python scripts/demo.py --output runs/demo

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(PAGES) $(SOURCES)
	$(BIN)/python scripts/check_prose.py $(PROSE)

types: $(READY)
	$(BIN)/mypy nemo nemo_modelopt_dropin nemo_modelopt_cli scripts

$(DOCS_VENV)/.ready: constraints.txt docs/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -r docs/requirements.txt
	@touch $@

docs: $(DOCS_VENV)/.ready
# Without --quiet, which hides warnings from --strict: they would no longer be errors.
	@if [ -x $(DOCS_VENV)/bin/mkdocs ]; then NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict; \
	else echo "The documentation tools need Python 3.11 or 3.12: the site was not built."; fi

# A folder of its own, on the path of these tests only: other tests run as on a machine without Transformer Engine. They
# need neither a test process that imports NeMo nor the suite's fixtures, hence --confcutdir. TESTS chooses tests: TESTS="-k prune".
# ROW chooses other versions, as for test-compat: ROW=modelopt-0.44.0
TE ?= build/te_on_cpu
TE_ENV = TEST_DEVICE=cpu PYTHONPATH=$(abspath $(TE)):$(abspath test_code/te_on_cpu/startup)
TE_PYTEST = $(TE_ENV) $(BIN)/python $(if $(ROW),scripts/test_compat.py --row $(ROW) --,-m pytest) \
  --confcutdir=test_code/te_on_cpu test_code/te_on_cpu
$(TE)/.ready: test_code/te_on_cpu/requirements.txt | $(READY)
	rm -rf $(TE)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps --target $(TE) -r test_code/te_on_cpu/requirements.txt
	@touch $@

# A folder of its own, on the path of lm-eval's process only. The first part needs no process that imports NeMo.
EVAL ?= build/eval
EVAL_PYTEST = EVAL_PATH=$(abspath $(EVAL)) $(BIN)/python -m pytest -m evaluation test_code/evaluation
$(EVAL)/.ready: test_code/evaluation/requirements.txt constraints.txt | $(READY)
	rm -rf $(EVAL)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps --target $(EVAL) -c constraints.txt \
	  -r test_code/evaluation/requirements.txt
	@touch $@

# What uses one core each: two of them side by side, the output of each in one piece.
.PHONY: checks test-te-main test-eval-main
checks: lint types docs test-te-main test-eval-main
test-te-main: $(TE)/.ready
	$(TE_PYTEST) -m 'te and main'
test-eval-main: $(EVAL)/.ready
	$(EVAL_PYTEST)/test_lm_eval.py --confcutdir=test_code/evaluation

test: $(READY)
	$(MAKE) --no-print-directory --output-sync=target -j $(JOBS) checks
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# PYTEST chooses the interpreter, for a container that has NeMo: PYTEST="python -m pytest".
PYTEST ?= $(BIN)/python -m pytest
test-gpu: $(if $(filter $(BIN)/%,$(PYTEST)),$(READY))
	TEST_DEVICE=cuda $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

# `SLOW_TIMEOUT` bounds one test, in seconds.
SLOW_TIMEOUT ?= 3600
test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow --timeout $(SLOW_TIMEOUT)

test-families: $(READY)
	$(BIN)/python -m test_code.families.matrix $(FAMILY) $(WRITE)

# An environment of its own: vLLM and NeMo pin different versions of PyTorch. TESTS chooses tests: TESTS="-k mixtral".
SERVING ?= build/serving
$(SERVING)/.ready: test_code/serving/requirements.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/pip install --quiet --no-compile --disable-pip-version-check -r test_code/serving/requirements.txt
# For images and sound, which are not served here. Wheels for CUDA fail to load with a PyTorch for CPUs, and transformers
# imports what is installed.
	$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-serving: $(READY) $(SERVING)/.ready
	SERVING_PYTHON=$(SERVING)/bin/python $(BIN)/python -m pytest test_code/serving -m serving $(TESTS)

# SUITE runs other tests of the suite on Transformer Engine's layers, as on GPUs: SUITE=test_code/test_pruner.py
test-te: $(READY) $(TE)/.ready
	$(if $(SUITE),TEST_SPEC=te $(TE_ENV) $(BIN)/python -m pytest $(SUITE),$(TE_PYTEST) -m te $(TESTS))

test-eval: $(READY) $(EVAL)/.ready
	$(EVAL_PYTEST) $(TESTS)

# They start processes of their own, on the versions that test-compat installs; the test process imports no NeMo.
test-across: $(READY)
	$(BIN)/python -m pytest -m across --confcutdir=test_code/across_versions test_code/across_versions $(TESTS)

test-compat: $(READY)
	$(BIN)/python scripts/test_compat.py $(if $(ROW),--row $(ROW)) $(if $(WHOLE),--whole) $(if $(TESTS),-- $(TESTS))

bench: $(READY)
	@for script in $(filter-out benchmarks/_%.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(DOCS_VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
