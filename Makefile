# Everything a newcomer needs: `make demo`, then `make test`. Each sets up what it is missing, once.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PY := $(BIN)/python

.PHONY: venv demo test test-slow test-faults lint bench-kernels bench-loader bench-step gpu-check simd clean

venv: $(READY)

# torch first and pinned: the packages that build against it find it, and nothing replaces it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cu13,dev]'
	touch $@

data/demo/manifest.json: | $(READY)
	$(BIN)/python data_prep/sample_photos.py --out data/demo

# A tiny DDAE, then its nearest neighbours beside untrained weights, raw pixels and chance, where colour tells nothing.
demo: $(READY) data/demo/manifest.json
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --preset demo
	$(BIN)/python launch/knn.py --encoder runs/demo --data data/demo --grey --workers 2

# Two files of tests at a time: most of what they wait for is Python's own start.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/test_loader.py
	$(BIN)/python -m pytest tests/test_loader.py  # forks readers beside threads: in a process that nothing else has used

# Long sweeps over settings that make test covers with fewer cases.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The long tests: kills, damage, signals, many ranks, two hosts. docs/reliability.md is made of what they saw.
test-faults: $(READY)
	$(BIN)/python -m pytest -m 'faults or reliability' -o junit_family=xunit1 --junitxml .faults.xml; failed=$$?; \
		$(BIN)/python tests/support/reliability.py .faults.xml docs/reliability.md; exit $$failed

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Times of the losses; on a GPU the rows are added to kernels/bench/results.csv.
bench-kernels: $(READY)
	$(BIN)/python kernels/bench/bench.py --step ddae_vit_b16_100e

# The training step, rung by rung, over a naive one.
bench-step: $(READY)
	$(BIN)/python launch/benchmark.py step $(BENCH)

# pillow-simd beside Pillow, for the benchmark to take turns with: DATA is a folder of shards.
.simd: $(READY)
	CC="cc -mavx2" $(BIN)/pip install --quiet --constraint constraints.txt --no-deps --no-binary pillow-simd --target .simd pillow-simd

bench-loader: .simd
	$(BIN)/python launch/benchmark.py loader --data $(DATA) --simd .simd $(BENCH)

# What only a GPU can show, into gpu-check.json, meant to take eight minutes; with DATA=shards the loader, too. Where there is a
# Python with everything but this project: make gpu-check PY=python3
gpu-check:
	PYTHONPATH=kernels:. $(PY) tests/gpu_check.py gpu-check.json $(DATA)

# pillow-simd has pillow's import name: one of the two is installed, never both.
simd: $(READY)
	$(BIN)/pip uninstall --quiet --yes pillow pillow-simd
	CC="cc -mavx2" $(BIN)/pip install --quiet --constraint constraints.txt --no-binary pillow-simd pillow-simd
	$(BIN)/python -c "import PIL; print('pillow-simd', PIL.__version__)"

clean:
	rm -rf runs data/demo .simd mlflow.db mlruns build .faults.xml *.egg-info .pytest_cache .ruff_cache
