# make demo   an environment in .venv, cachepass in it, and its demo
# make test   the same, and the tests
#
# With uv, where it is at hand and reaches the packages; else with python3's own venv and pip.

PYTHON ?= python3
VENV := .venv
EXTRAS := -c constraints.txt -e ".[dev]"

.PHONY: demo test

demo: $(VENV)/installed
	$(VENV)/bin/cachepass demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

$(VENV)/installed: pyproject.toml constraints.txt
	(command -v uv >/dev/null && uv venv --clear --python $(PYTHON) $(VENV) && \
	  uv pip install --python $(VENV)/bin/python $(EXTRAS)) || \
	($(PYTHON) -m venv --clear $(VENV) && $(VENV)/bin/python -m pip install $(EXTRAS))
	touch $@
