# Every target makes what it needs in a virtual environment of its own; PYTHON is the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
# A worker needs a gigabyte and a half of memory, so not one for each core of a large machine. A file stays in one worker,
# with what its tests share.
PYTEST = -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 10

.PHONY: help demo app docs test test-slow test-oldest check wheel format clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s:

demo: $(VENV)/.demo ## train a captioner on real pictures in minutes, and see what it says
	$(VENV)/bin/python examples/demo.py $(ARGS)

app: $(VENV)/.demo $(VENV)/.app ## a web page with the demo's models, which are trained first if they are not there
	test -e outputs/demo/model -a -e outputs/demo/scenes || $(VENV)/bin/python examples/demo.py
	$(VENV)/bin/blip2-hf demo $(ARGS)

docs: $(VENV)/.docs ## the documentation in a browser, built anew when a page or a docstring changes
	$(VENV)/bin/python -m zensical serve $(ARGS)

test: $(VENV)/.test $(VENV)/.app $(VENV)/.docs ## the test suite
	$(VENV)/bin/python $(PYTEST) $(ARGS)

test-slow: $(VENV)/.test $(VENV)/.app ## the tests that take minutes
	$(VENV)/bin/python $(PYTEST) --dist load -m slow $(ARGS)

test-oldest: $(OLDEST)/.test ## the test suite on the oldest versions that setup.cfg admits
	$(OLDEST)/bin/python $(PYTEST) $(ARGS)

check: $(VENV)/.test $(VENV)/.app $(VENV)/.docs ## lint, format, types, the documentation's links
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m zensical build --strict --clean
	$(VENV)/bin/python docs_site/check.py site

wheel: $(VENV)/.test ## build the package into dist/, and try the wheel in a new environment
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	$(VENV)/bin/python tests/wheel/check.py dist

format: $(VENV)/.test ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the virtual environments
	rm -rf $(VENV) $(OLDEST)

# torch goes first: the other packages then find it, and do not fetch another build
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@touch $@

$(VENV)/.%: $(VENV)/.torch setup.cfg
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(OLDEST)/.test: constraints-oldest.txt setup.cfg
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	@touch $@
