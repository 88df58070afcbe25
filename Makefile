# Every target sets up what it needs: a machine with Python 3.11 or newer and access to a package index is enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV       := .venv
BIN        := $(VENV)/bin
# What the demo needs, and with the second all that tests and checks need.
DEMO_STAMP := $(VENV)/.stamp-demo
STAMP      := $(VENV)/.stamp
UV         := .cache/uv
# Passed on to the command, as in: make test ARGS="-k scope -x"
ARGS   ?=
# How many processes share the tests, each with a broker, a Redis and a stack of its own; 0: none besides pytest, as --pdb needs it
JOBS   ?= 3
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 3 --durations 10 --durations-min 5

# The tests start hundreds of Python processes: each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

SUITES := tests/unit tests/contract tests/gateway tests/policy tests/flows tests/integration tests/chaos tests/e2e
# What the gateway's fast path takes part in.
SLOW_PATH := tests/gateway $(wildcard tests/flows/test_gateway*.py) tests/flows/test_observe.py tests/flows/test_cuts.py \
	tests/unit/test_gateway_gate.py tests/unit/test_gateway_approving.py tests/unit/test_gateway_observing.py \
	tests/flows/test_lifecycle.py tests/flows/test_expired_trust.py

define need_python
@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with PYTHON=/path/to/python" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is too old: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help demo demo-runner dev lint format test test-slow-path test-apache test-tools test-upgrade test-opa test-backends test-gateways test-passkeys test-console screenshots test-mcp test-runner test-containers test-helm chaos mutants schemas schemas-check references docs test-docs bench wheel-check release release-check lock clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

define install
$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r
endef

# The locks decide every version, and nothing is built from source: that would fetch what no hash covers. The project
# itself is installed as a link into services/.
$(DEMO_STAMP): pyproject.toml requirements-demo.lock
	$(need_python)
	@echo "Setting up $(VENV) (once)" >&2
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@$(install) requirements-demo.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP): $(DEMO_STAMP) requirements.lock
	@echo "Adding to $(VENV) what tests and checks need (once)" >&2
	@$(install) requirements.lock
	@touch $@

demo: $(DEMO_STAMP) ## the story in a minute: an agent's task, its credential, its end
	@$(BIN)/ringfence demo $(ARGS)

demo-runner: $(DEMO_STAMP) ## a reviewer follows an injected instruction, in a shell and then in a run (needs bubblewrap)
	@$(BIN)/ringfence demo --runner $(ARGS)

dev: $(DEMO_STAMP) ## the whole stack on this machine, with an embedded broker; Ctrl-C ends it
	@$(BIN)/ringfence dev $(ARGS)

test: $(STAMP) ## all tests, on the embedded broker and a real Valkey
	$(BIN)/python -m pytest $(SUITES) -m "not tools and not upgrade" $(SHARED) $(ARGS)

test-slow-path: $(STAMP) ## the tests of what has a fast path, with that switched off: the result must be the same
	$(BIN)/python -m pytest $(SLOW_PATH) -m "not tools" --no-fast-path $(SHARED) $(ARGS)

test-apache: $(STAMP) ## what is about Kafka itself, on a real Apache Kafka (needs a JDK 17+ and Maven)
	$(BIN)/python -m pytest tests/integration -m "(broker or apache) and not tools and not upgrade" --kafka apache $(SHARED) $(ARGS)

test-tools: $(STAMP) ## the tests with programs of others: kcat, curl, git, nginx, fcgiwrap, npm, rsyslog, promtool, zsh, fish, age, bubblewrap, and scanners and SDKs of model providers that it fetches once (190 MB)
	PYTHON="$(BIN)/python" $(BIN)/python -m pytest tests/integration tests/gateway tests/flows -m tools $(SHARED) $(ARGS)

test-upgrade: $(STAMP) ## upgrade an installation of the version before, by the wheels of both (needs its commit in this clone)
	$(BIN)/python -m pytest tests/integration -m upgrade $(ARGS)

test-opa: $(STAMP) ## the policy tests on a real OPA as well (needs Go 1.21+; built once, in two minutes)
	$(BIN)/python -m pytest tests/policy --opa build $(SHARED) $(ARGS)

test-backends: $(STAMP) ## every backend on its real server (PostgreSQL, OpenSSH, Go 1.21+; fetches OpenBao once, 75 MB)
	PYTHON="$(BIN)/python" $(BIN)/python -m pytest tests/backends $(SHARED) $(ARGS)

test-gateways: $(STAMP) ## nginx, HAProxy, Envoy, Caddy and Traefik before a target (needs the first two; fetches the others once, 105 MB)
	$(BIN)/python -m pytest tests/gateway_external $(SHARED) $(ARGS)

test-passkeys: $(STAMP) ## people sign with passkeys in a real browser, on the running stack (needs Chromium and Firefox: apt-get install chromium firefox-esr)
	$(BIN)/python -m pytest tests/passkeys $(SHARED) $(ARGS)

test-console: $(STAMP) ## the console in a real browser, on the running stack (needs Chromium; fetches axe-core once by npm)
	$(BIN)/python -m pytest tests/console $(SHARED) $(ARGS)

screenshots: $(STAMP) ## the pictures of the console that docs/console.md shows (ARGS=--png: every page, in both themes and at two widths)
	$(BIN)/python -m tests.console.screenshots docs/images/console $(ARGS)

test-mcp: $(STAMP) ## MCP through the gateway by its official SDKs, Python 1.x and 2.x and TypeScript, and the conformance suite (fetches them once, 320 MB; needs bubblewrap)
	$(BIN)/python -m pytest tests/mcp_sdks $(SHARED) $(ARGS)

test-runner: $(STAMP) ## sandboxes of every kind, and programs that try to get out (needs bubblewrap and libseccomp, root for all of it; OCI=podman)
	$(if $(OCI),RINGFENCE_TEST_OCI=$(OCI)) $(BIN)/python -m pytest tests/runner $(SHARED) $(ARGS)

test-containers: $(STAMP) ## the image and docker-compose.yml on Podman (needs root, debootstrap, Podman and a JDK; makes its base images once, in two minutes)
	$(BIN)/python -m pytest tests/containers $(SHARED) $(ARGS)

test-helm: $(STAMP) ## the Helm chart, each of its pods, and releases on a real API server (needs etcd, Go 1.21+ and bubblewrap; builds Helm and the server once, in ten minutes)
	PYTHON="$(BIN)/python" $(BIN)/python -m pytest tests/helm $(SHARED) $(ARGS)

chaos: $(STAMP) ## everything fails for SECONDS=60, as SEED=n has it, and no lease may be forgotten (JDK 17+, Maven)
	$(BIN)/python -m tests.chaos.run --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: $(STAMP) ## mistakes put into the modules that decide, one at a time: unit tests find them (ARGS="model/scope/rule.py")
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP) ## ruff, mypy, import-linter
	@status=0; for check in "ruff check ." "ruff format --check ." mypy \
		lint-imports "lint-imports --no-cache tools/import_cycles.toml"; do \
		echo "$(BIN)/$$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

format: $(STAMP) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: $(STAMP) ## generate schemas/ and the table in docs/topics.md from ringfence.messages
	$(BIN)/python -m tools.schemas.generate schemas docs/topics.md

references: $(STAMP) ## generate docs/reference/, docs/cli.md and docs/metrics.md from the code
	$(BIN)/python -m tools.references

schemas-check: $(STAMP) ## fail where schemas/ or a generated reference differs from the code
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/python -m tools.schemas.generate "$$fresh" && \
	{ diff -ru schemas "$$fresh" && echo "schemas/ is up to date" || \
		{ echo "schemas/ differs from ringfence.messages: run 'make schemas' and commit the result" >&2; exit 1; }; }
	@$(BIN)/python -m tools.references --check && echo "the references are up to date"

docs: $(STAMP) ## build the site of docs/ into build/site: links and anchors are checked, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

test-docs: $(STAMP) ## the site in a real browser, and the commands of its pages (needs Chromium and jq)
	$(BIN)/python -m pytest tests/site $(SHARED) $(ARGS)

bench: $(STAMP) ## the benchmarks: each prints its numbers and the machine
	$(BIN)/python -m bench $(ARGS)

wheel-check: $(STAMP) ## build the wheel and use it alone, without the extras
	@PYTHON="$(BIN)/python" .ci/wheel-check

release: $(STAMP) ## one folder with everything that an installation needs: FOLDER=..., signed by the SSH key KEY=..., with an image by PODMAN=podman
	@PYTHON="$(BIN)/python" $(BIN)/python -m tools.release make $(FOLDER) $(if $(KEY),--key $(KEY)) $(if $(PODMAN),--podman $(PODMAN)) $(ARGS)

release-check: $(STAMP) ## verify the release in FOLDER=... by SIGNERS=..., install from it alone and run the demo (PODMAN=podman: its image, too)
	@$(BIN)/python -m tools.release check $(FOLDER) --signers $(SIGNERS) $(if $(PODMAN),--podman $(PODMAN)) $(ARGS)

# uv itself is installed by the hashes of .ci/uv.txt; each of these writes a file in which everything has its hashes.
compile = $(UV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url \
	--python-version 3.11 --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

lock: ## renew the locks: requirements*.lock, .ci/uv.txt, .ci/mitmproxy.txt, .ci/scanners.txt, .ci/mcp.txt, .ci/model-sdks.txt, .ci/sbom.txt, tests/mcp_sdks/node (UPGRADE=1: to the newest versions)
	$(need_python)
	@$(PYTHON) -m venv $(UV)
	@$(UV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		-r .ci/uv.txt
	$(compile) --all-extras pyproject.toml -o requirements.lock
	$(UV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' | \
		$(compile) --extra dev --constraints requirements.lock pyproject.toml - -o requirements-demo.lock
	$(compile) .ci/uv.in -o .ci/uv.txt
	$(compile) .ci/mitmproxy.in -o .ci/mitmproxy.txt
	$(compile) .ci/scanners.in -o .ci/scanners.txt
	$(compile) .ci/mcp.in -o .ci/mcp.txt
	$(compile) .ci/model-sdks.in -o .ci/model-sdks.txt
	$(compile) .ci/sbom.in -o .ci/sbom.txt
	cd tests/mcp_sdks/node && npm install --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit --no-fund

clean: ## remove environments, caches and builds; the keys and data in .ringfence stay
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
