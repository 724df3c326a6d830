# Four targets a newcomer needs: demo, test, lint, clean. Everything is installed from pinned lists.
#   PYTHON=/opt/python3.11 make demo      another interpreter; the servers' pinned lists are for 3.11, the tester runs on newer
#   ONLY=vllm make demo      one of the two servers
#   TWOCLOCKS_TORCH_INDEX=ADDRESS make demo      the CPU wheel index that PyTorch's install page names, where pip needs it
#   TWOCLOCKS_CACHE=/big/disk make demo      another place for the servers' environments and models (about 4 GB)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
COMPILE = build/lock/bin/uv pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
  --group build --custom-compile-command "make lock" pyproject.toml
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo install test lint format bench soak audit lock clean

demo: $(INSTALLED)
	@$(BIN)/python scripts/demo.py $(if $(ONLY),--only $(ONLY))

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock setup.py twoclocks/_native.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: PYTHON=python3.11 make demo")'
	@echo "installing the tester into .venv (about a minute)"
	@$(PYTHON) -m venv .venv || { echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 2; }
	@$(PIP) --require-hashes --only-binary :all: --requirement requirements.lock \
	  && $(PIP) --no-deps --no-build-isolation --editable . \
	  || { echo "the tester could not be installed (see above); is there a network, 1 GB of disk, and a wheel of each package for this system? (some have none for Alpine)"; exit 2; }
	@touch $@

# In two processes: most of the time goes into waiting for servers and browsers.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python scripts/reference.py

# The instrument against a known schedule and a bare C reader: minutes, on a quiet machine. ARGS="--quick" is shorter.
bench: $(INSTALLED)
	@$(BIN)/python benchmarks/bench.py $(ARGS)

# Four hours' worth of requests, compressed: is memory flat, is nothing lost, does nothing drift? 25 minutes, on a quiet machine.
soak: $(INSTALLED)
	@$(BIN)/python benchmarks/soak.py $(ARGS)

# Known vulnerabilities in what is pinned; needs a network that reaches https://api.osv.dev, and says where there is none.
audit:
	@$(PYTHON) scripts/audit.py $(ARGS)

# requirements.lock anew, with the newest versions that pyproject.toml allows: ARGS=--upgrade; else with what has changed there. And of
# these versions what the image needs.
lock:
	@$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(COMPILE) --extra dev --output-file requirements.lock $(ARGS)
	@$(COMPILE) --extra otel --output-file deploy/tester.lock --constraint requirements.lock

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
