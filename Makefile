# Every target works on a fresh clone: what it needs is made first. Everything made is in .cache.
#   PYTHON        interpreter for the environment (default: python3.11, else python3)
#   VENV          the environment (default: .cache/venv)
#   OLDEST_PYTHON interpreter for the environment with the oldest torch, 3.10 to 3.12 (default: PYTHON)
#   GPU_PYTHON    interpreter with a CUDA torch, einops and pytest, for the targets that need a GPU (default: python3)
#   JOBS          processes that run tests (default: 2)
#   COMFYUI_PATH  a ComfyUI checkout to use (default: the one this pack sits in, else one is fetched)

ifndef PYTHON
PYTHON := $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
endif
VENV ?= .cache/venv
OLDEST_PYTHON ?= $(PYTHON)
OLDEST_VENV ?= .cache/venv-torch2.4
OLDEST_READY := $(OLDEST_VENV)/.ready
GPU_PYTHON ?= python3
READY := $(VENV)/.ready
FOUND := .cache/comfyui.found
# A process that crashes ends the run: pytest-xdist would wait for its tests for ever.
PARALLEL = -n $${JOBS:-2} --dist loadfile --no-loadscope-reorder --max-worker-restart 0
RUN = COMFYUI_PATH="$$(head -n 1 $(FOUND))" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick page quality train-tiny bench bench-split aot cubins gpu bench-gpu bench-sampling tune clean FORCE
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^#   /  /p' Makefile; echo
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: $(READY) ## environment with CPU torch, and a ComfyUI checkout (2 minutes the first time)

demo: $(READY) ## run the example graph in a real ComfyUI, dense and sparse, and compare (a minute after setup)
	@$(RUN) $(VENV)/bin/python dev/demo.py

test: $(READY) $(OLDEST_READY) ## ruff and every test, those in a real ComfyUI and with the oldest torch too
	$(VENV)/bin/ruff check .
	$(RUN) REQUIRE_COMFYUI=1 REQUIRE_OLDEST=1 OLDEST_VENV="$(OLDEST_VENV)" $(VENV)/bin/pytest -q $(PARALLEL)

test-quick: $(READY) ## ruff and the tests that need no ComfyUI
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/pytest -q $(PARALLEL) -m "not host"

page: $(READY) ## the tests of ComfyUI's page in a real browser (needs Chromium: CHROMIUM, default /usr/bin/chromium)
	$(VENV)/bin/pip install -q playwright
	$(RUN) REQUIRE_COMFYUI=1 $(VENV)/bin/pytest -q tests/test_page.py

quality: $(READY) ## finished clips of the tiny trained model, dense against sparse, judged over paired seeds (ARGS="--all": hours)
	$(RUN) OMP_NUM_THREADS=1 $(VENV)/bin/python quality/table.py $(ARGS)

train-tiny: $(READY) ## train the tiny models of `quality` anew (two hours on two cores; goes on where it was stopped)
	$(RUN) OMP_NUM_THREADS=2 $(VENV)/bin/python quality/train.py
	$(VENV)/bin/python quality/model_file.py

bench: $(READY) ## the reference kernel against dense attention, and what closeness and lists by mass cost beside it
	$(VENV)/bin/python benchmarks/reference_vs_sdpa.py
	$(VENV)/bin/python benchmarks/closeness.py
	$(VENV)/bin/python benchmarks/masses.py

bench-split: $(READY) ## what several cards gain, predicted from stated rates; the bytes they trade, counted; timed where there are GPUs
	$(VENV)/bin/python benchmarks/split.py

aot: $(READY) ## compile the Triton kernels ahead of time for every supported GPU
	$(VENV)/bin/python dev/aot.py

cubins: $(READY) ## build the CUDA kernel's bundled files anew, after a change of its source
	$(VENV)/bin/python dev/bundle_cubins.py

gpu: ## on an NVIDIA GPU: every kernel against the oracle, 1000 equal runs, compute-sanitizer where there is one
	@failed=; for kernel in cuda_sm90 triton "not cuda_sm90 and not triton"; do \
		$(GPU_PYTHON) -m pytest -q -m gpu tests/kernels -k "$$kernel" || failed=1; done; [ -z "$$failed" ]
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck synccheck; do \
			timeout 300 compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) dev/prove_here.py || exit 1; done; \
	else echo "compute-sanitizer is not here: not run"; fi

bench-gpu: ## on an NVIDIA GPU: speed and error beside other kernels, into benchmarks/results (starts nothing new after 7 minutes, then the stages)
	$(GPU_PYTHON) -m kernels.prove
	$(GPU_PYTHON) benchmarks/gpu.py --seconds 420
	$(GPU_PYTHON) benchmarks/stages.py --shapes "H12 32760" "H40 75600" --sparsities 0.9

bench-sampling: $(FOUND) ## on an NVIDIA GPU, with ComfyUI's requirements in GPU_PYTHON: whole samplings, every method beside dense
	COMFYUI_PATH="$$(head -n 1 $(FOUND))" $(GPU_PYTHON) benchmarks/comfyui_sampling.py

tune: ## on an NVIDIA GPU: times launch options of the Triton kernel for its table (starts nothing new after 4 minutes)
	$(GPU_PYTHON) benchmarks/tune.py --seconds 240

clean: ## remove everything that was made, .cache first of all
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The checkout and a checksum of what it asks for: rewritten only when one of them changes.
$(FOUND): FORCE
	@mkdir -p .cache
	@$(PYTHON) dev/get_comfyui.py > $@.new
	@cksum < "$$(head -n 1 $@.new)/requirements.txt" >> $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(READY): $(FOUND) dev/setup_env.sh dev/tv_cpu_hook.py requirements.txt
	PYTHON="$(PYTHON)" dev/setup_env.sh "$(VENV)" "$$(head -n 1 $(FOUND))"
	@touch $@

$(OLDEST_READY): dev/setup_oldest.sh dev/hollow_cuda.py
	PYTHON="$(OLDEST_PYTHON)" dev/setup_oldest.sh "$(OLDEST_VENV)"
	@touch $@
