# Every target builds .venv itself; a full install downloads about 4 GB and takes about 3 minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
MODEL := models/smollm2-135m-instruct

# The demo and the tests use local models; nothing is looked up on a model hub.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup model demo distill-demo example-loop test test-sglang test-slow fuzz soak audit lint format bench bench-drafts bench-gpu proof proof-gpu serve-demo clean
SOAK_SECONDS ?= 1800
FUZZ_SECONDS ?= 3600
# Two files at once, a core each, in the order of collection: see tests/conftest.py.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder
# Folders with a config and a tokenizer, or ids in the local cache, of which bench-gpu makes dummy weights. Empty: of
# Qwen2.5's dimensions, 7B and 1.5B, which it writes itself.
BENCH_TEACHER ?=
BENCH_STUDENT ?=
GPU_SECONDS ?= 600
# Minutes of make proof; the same command goes on.
PROOF_MINUTES ?= 90
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try PYTHON=python3.11 make ...")'
	@echo 'Building $(VENV): about 3 minutes, 11 GB.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,distill,train,dev]'
	touch $@

setup: $(READY)  ## build .venv with SGLang and everything else

$(MODEL)/config.json: $(READY)
	@echo 'Preparing the small model: half a minute.'
	$(BIN)/python -m sglang_optimal.demo.prepare_model --output $(MODEL)
	touch $@

model: $(MODEL)/config.json  ## prepare SmolLM2-135M-Instruct under models/

demo: $(MODEL)/config.json  ## mixed text from the real small model, beside teacher and student alone (ARGS=--help for more)
	$(BIN)/python -m sglang_optimal.demo --model-path $(MODEL) $(ARGS)

serve-demo: $(MODEL)/config.json  ## a server with the small model as teacher and student
	$(BIN)/python -m sglang_optimal.launch_server --model-path $(MODEL) --student-model-path $(MODEL) --config configs/base.yaml

distill-demo: $(MODEL)/config.json  ## a small distillation run with its report, and its export for a trainer
	$(BIN)/python -m sglang_optimal.distill run configs/demo.yaml --data sglang_optimal/demo/problems.jsonl --out runs/demo
	$(BIN)/python -m sglang_optimal.distill export runs/demo --output runs/demo/train.parquet --format trl-sft

example-loop: $(MODEL)/config.json  ## generate, filter, train, update the student live, evaluate; under 40 minutes on two cores
	$(BIN)/python -m sglang_optimal.demo.loop --model-path $(MODEL) $(ARGS)

test: $(READY)  ## the whole suite but the slow tests, two at a time; 15 minutes on two cores, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(BESIDE)

test-sglang: $(READY)  ## contract and oracle identity on another release of SGLang (VERSION=0.5.22); all else as in .venv; 10 minutes
	$(BIN)/python tests/other_release.py $(VERSION)

test-slow: $(READY)  ## minutes of random traffic, and new random examples for the property tests
	$(BIN)/python -m pytest -m slow
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest tests/mixing tests/test_config.py

fuzz: $(READY)  ## random requests, all fields of them, for FUZZ_SECONDS (an hour)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s -m slow tests/server/test_fuzz_requests.py

soak: $(READY)  ## half an hour of everything at once on pools that are far too small; reports under soak/
	SOAK_SECONDS=$(SOAK_SECONDS) SOAK_REPORTS=soak $(BIN)/python -m pytest -s tests/soak

bench: $(MODEL)/config.json  ## all benchmarks on the small model, about 35 minutes on two cores; results under bench/results
	$(BIN)/python -m bench.throughput --model-path $(MODEL)
	$(BIN)/python -m bench.alpha
	$(BIN)/python -m bench.profile --model-path $(MODEL) --output-len 24 --repeats 1
	$(BIN)/python -m bench.peers_throughput --model-path $(MODEL) --batch-size 1 8 16 --output-len 24 --repeats 2
	$(BIN)/python -m bench.serving --model-path $(MODEL) --request-rate 1 2 --num-prompts 24 --input-len 96 \
		--student-input-len 64 --output-len 24

bench-drafts: $(MODEL)/config.json  ## two students distilled for a few minutes, and what drafting with them gives; two to three hours on two cores
	$(BIN)/python -m bench.small_student --model-path $(MODEL) --layers 4 3 --output models/smollm2-small
	$(BIN)/python -m bench.speculative --model-path $(MODEL) --student-model-path models/smollm2-small-4 --run-name 4-layers
	$(BIN)/python -m bench.speculative --model-path $(MODEL) --student-model-path models/smollm2-small-3 --run-name 3-layers

bench-gpu: $(MODEL)/config.json  ## all checks of a one-GPU machine, dummy weights, GPU_SECONDS (600) at most; see bench/gpu/README.md
	$(BIN)/python -m bench.gpu.run_checks --stage all --budget $(GPU_SECONDS) \
		$(if $(BENCH_TEACHER),--teacher $(BENCH_TEACHER)) $(if $(BENCH_STUDENT),--student $(BENCH_STUDENT))

proof: $(MODEL)/config.json  ## what the mixture teaches beside other ways, docs/proof.md; PROOF_MINUTES (90) on two idle cores, again goes on
	$(BIN)/python -m bench.proof --budget $(PROOF_MINUTES) --model-path $(MODEL) $(ARGS)
	$(BIN)/python -m bench.proof.page

proof-gpu: $(MODEL)/config.json  ## the same with larger batches, ten minutes on one GPU
	$(BIN)/python -m bench.proof --scale gpu --budget 10 --model-path $(MODEL) $(ARGS)
	$(BIN)/python -m bench.proof.page

audit: $(READY)  ## known vulnerabilities of everything installed; fails if something cannot be looked up
	$(BIN)/pip freeze --exclude-editable > $(VENV)/audit.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r $(VENV)/audit.txt

lint: $(READY)  ## ruff: rules and format; mypy: types; half a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches (not models/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
