# `make demo` trains a small model, `make test` runs the tests. The first call of each creates the environment.

PYTHON ?= python3
VENV := .venv
# CUDA of torch and DALI: cu13, cu12 (for drivers older than 580), or cpu; default: that of the environment, else cu13.
CUDA ?= $(or $(patsubst $(VENV)/.ready-%,%,$(firstword $(wildcard $(VENV)/.ready-*))),cu13)
READY := $(VENV)/.ready-$(CUDA)
DEV := $(VENV)/.dev-$(CUDA)
FOR_OTHER_CUDA := $(filter-out $(READY),$(wildcard $(VENV)/.ready-*))
CONSTRAINTS := --constraint constraints.txt --constraint constraints-$(CUDA).txt
# torch without CUDA's libraries is on an index of its own.
ifeq ($(CUDA),cpu)
CONSTRAINTS += --extra-index-url https://download.pytorch.org/whl/cpu
endif
BIN := $(VENV)/bin
PY := $(BIN)/python
# Modules are compiled when they are first imported: most never are, and installing takes 40 s less of a core. With this
# variable Python does not keep the compiled modules: each command would compile two thousand again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE
COMPILE := $(PY) -c "import deepspeed, matplotlib.figure, mlflow, rich.progress, timm, tyro, webdataset" > /dev/null
INSTALL := $(BIN)/pip install --quiet --no-compile $(CONSTRAINTS)

.PHONY: venv demo test test-slow test-faults soak lint docs bench-kernels bench-loader bench-step gpu-check simd clean

# make venv CUDA=cu12
venv: $(READY)

# torch is installed first: other packages build against it, and the constraint keeps them from replacing it.
$(READY): pyproject.toml constraints.txt constraints-$(CUDA).txt
	$(if $(FOR_OTHER_CUDA),$(PYTHON) -m venv --clear $(VENV),test -x $(BIN)/python || $(PYTHON) -m venv $(VENV))
	$(INSTALL) torch torchvision setuptools wheel
	$(INSTALL) --no-build-isolation --editable '.[$(CUDA)]'
	$(COMPILE)
	touch $@

# What the tests, the checks and the documentation need in addition.
$(DEV): $(READY)
	$(INSTALL) --no-build-isolation --editable '.[$(CUDA),dev]'
	touch $@

data/demo/manifest.json: | $(READY)
	$(BIN)/python data_prep/sample_photos.py --out data/demo

# Train a tiny DDAE; then compare its k-NN accuracy on grey images with untrained weights, raw pixels and chance.
demo: $(READY) data/demo/manifest.json
	$(BIN)/ddae pretrain --preset demo
	$(BIN)/ddae knn --encoder runs/demo --data data/demo --grey --workers 2

# Two test modules at a time.
test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Long tests: golden curves in bf16 and with every option, measured FLOPs of ViT-B, benchmarks, launchers.
test-slow: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

# Long tests of failures: kills, damaged files, signals, many ranks, two hosts. Their results make docs/reliability.md.
test-faults: $(DEV)
	$(BIN)/python -m pytest -m 'faults or reliability' -o junit_family=xunit1 --junitxml .faults.xml; failed=$$?; \
		$(BIN)/python tests/support/reliability.py .faults.xml docs/reliability.md; exit $$failed

# Two ranks suffer random faults for an hour; the result goes into docs/reliability.md. It needs root: make soak MINUTES=60
MINUTES ?= 60
soak: $(DEV)
	PYTHONPATH=.:kernels:tests:tests/support $(PY) tests/soak.py --minutes $(MINUTES) --out docs/results/soak.json

# The documentation site, in site/: open site/index.html.
docs: $(DEV)
	$(BIN)/mkdocs build --strict

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright

# Benchmark the losses; on a GPU the rows are appended to kernels/bench/results.csv.
bench-kernels: $(READY)
	$(BIN)/python kernels/bench/bench.py --step ddae_vit_b16_100e

# Benchmark the training step, variant by variant, relative to the naive one.
bench-step: $(READY)
	$(BIN)/python launch/benchmark.py step $(BENCH)

# Install pillow-simd into its own folder, to benchmark it beside Pillow. DATA is a folder of shards.
.simd: $(READY)
	CC="cc -mavx2" $(INSTALL) --no-deps --no-binary pillow-simd --target .simd pillow-simd

bench-loader: .simd
	$(BIN)/python launch/benchmark.py loader --data $(DATA) --simd .simd $(BENCH)

# Run the checks that need a GPU, in at most eight minutes, and write gpu-check.json; DATA=SHARDS adds the loaders.
# With a Python that has all dependencies: make gpu-check PY=python3; at tiny sizes, without a GPU: make gpu-check DRY=1
gpu-check:
	$(PY) tests/gpu_check.py gpu-check.json $(DATA) $(if $(DRY),--dry)

# Replace Pillow by pillow-simd: both have the same import name, so only one can be installed.
simd: $(READY)
	$(BIN)/pip uninstall --quiet --yes pillow pillow-simd
	CC="cc -mavx2" $(INSTALL) --no-binary pillow-simd pillow-simd
	$(BIN)/python -c "import PIL; print('pillow-simd', PIL.__version__)"

clean:
	rm -rf runs data/demo .simd mlflow.db mlruns build .faults.xml *.egg-info .pytest_cache .ruff_cache
