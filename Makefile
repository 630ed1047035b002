PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo serve test test-faults test-clients cluster-tools test-cluster check protos clients chart-examples dashboards dashboard-pictures

# Everything a developer needs, in .venv; again only when pyproject.toml changed.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# All services on this host, one streamed chat completion, how it travelled.
demo: install
	$(BIN)/python -m services.launch.demo

# The built-in model on http://127.0.0.1:30000 until Ctrl-C; ARGS="--model-path ..." for another.
serve: install
	$(BIN)/rhizome serve $(ARGS)

# Three processes, since most tests wait for others.
test: install
	$(BIN)/pytest -q -n 3 --dist loadfile -m 'not gpu and not multigpu and not faults and not clients and not cluster'

# FAULT_SCALE in (0, 1] shrinks the numbers of requests and seconds.
test-faults: install
	$(BIN)/pytest -q -m faults

# The clients of other languages, built and run against a system; skipped where tools are missing.
test-clients: install
	$(BIN)/pytest -q -rs -m clients tests/clients

# A Kubernetes control plane from source, into a cache folder; needs Go. Minutes, the first time.
cluster-tools:
	tests/cluster/tools/build

# What needs that control plane, or root and network namespaces; skipped where there is none.
# Two processes, each with a control plane of its own: the tests mostly wait.
test-cluster: install
	$(BIN)/pytest -q -rs -n 2 --dist loadfile -m cluster tests/cluster

check: install
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	buf lint protos
	$(BIN)/pytest -q tests/architecture

protos: install
	protos/generate.sh rhizome

# The chart's dashboards, from deploy/grafana.
dashboards: install
	$(BIN)/python -m deploy.grafana

# Their pictures in docs/images, from a system under load; needs prometheus, takes a few minutes.
dashboard-pictures: install
	$(BIN)/python -m tests.e2e.observed

# The code of the Go and TypeScript clients; needs go and npm.
clients: install
	clients/generate.sh clients

# What the Helm chart's examples render to, after a change of a template: look at the difference.
chart-examples: install
	$(BIN)/python -m tests.chart.examples
