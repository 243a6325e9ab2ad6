# make train          set up, then train on the embedded digits (ARGS="--dataset_name cifar10" for others)
# make test           set up, then the unit tests and one golden path: under five minutes on two cores
# make proofs         every other test: whole runs, kills, browser, notebook, two processes, large models
# make check          format, lint, types             make format   rewrite to the house format
# make bench          set up with torch, then every benchmark of speed, in 11 to 19 minutes on two CPU cores
# make latents-demo   a VAE of two photographs, their latents, a diffusion transformer of those
# make demo           a page in the browser to sample from the runs in runs/ (ARGS="--run …")
# make screenshots    images of that page for README.md; needs Chromium
# make install        only set up
PYTHON ?= python3
BIN = .venv/bin
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
PIP = $(UV) pip install --quiet --python $(BIN)/python
else
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: train test proofs bench check format install latents-demo demo screenshots

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

CORES = $(shell getconf _NPROCESSORS_ONLN)
PYTEST = $(BIN)/python -m pytest --dist worksteal
# Two workers more than cores: many proofs wait, for a kill, a lost process or a browser.
WAITING = $(shell echo $$(( $(CORES) < 2 ? $(CORES) + 2 : 4 )))
test: .venv/installed-dev
	$(PYTEST) -n auto --maxprocesses 4 tests/unit tests/system/test_golden_path.py $(ARGS)

proofs: .venv/installed-dev
	$(PYTEST) -n $(WAITING) tests/run tests/system --ignore tests/system/test_golden_path.py $(ARGS)

# Fifty steps of sampling are ten times five: the loop is one program, however long it runs.
bench: .venv/installed-bench
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sample.py --n_steps 5
	$(BIN)/python benchmarks/startup.py
	set -e; for script in $(wildcard benchmarks/input.py benchmarks/scaling.py); do \
		$(BIN)/python $$script; done

demo: .venv/installed-demo
	$(BIN)/python demo.py $(ARGS)

SHOWN := runs/screenshots-$(shell date +%Y%m%d-%H%M%S)
screenshots: .venv/installed-dev
	$(BIN)/python train.py --n_steps 600 --log_every 10 --sample_every_n 100 --run_dir $(SHOWN)
	$(BIN)/python tests/support/screenshots.py --run $(SHOWN)

DEMO := runs/latents-demo-$(shell date +%Y%m%d-%H%M%S)
latents-demo: .venv/installed-dev
	$(BIN)/python benchmarks/crops.py --out $(DEMO)/photos
	$(BIN)/python train_vae.py --dataset_name folder:$(DEMO)/photos --image_size 64 --batch_size 8 \
		--block_out_channels 16,32,64 --noattention --learning_rate 2e-3 --n_steps 900 \
		--run_dir $(DEMO)/vae
	$(BIN)/python convert_imagenet.py --dataset_name folder:$(DEMO)/photos --image_size 64 \
		--vae $(DEMO)/vae/vae --out $(DEMO)/latents --verify 64
	$(BIN)/python convert_imagenet.py --doctor $(DEMO)/latents
	$(BIN)/python train.py --latents $(DEMO)/latents --learning_rate 2e-3 --ema_decay 0.98 --n_steps 600 \
		--batch_size 64 --run_dir $(DEMO)/dit

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifndef UV
	$(PIP) --upgrade "pip>=25.1" # which knows dependency groups
endif
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-%: pyproject.toml .venv/installed
	$(PIP) --group $*
	touch $@
