# make tables: set everything up and make both tables' embedded columns, with pictures.
# make test:   set everything up and run the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PROFILE ?= embedded

.PHONY: setup fetch tables test lab clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray]"
	touch $@

fetch: setup
	$(BIN)/fmbseg fetch --profile embedded

tables: fetch
	$(BIN)/fmbseg reproduce $(PROFILE)

test: fetch
	$(BIN)/python -m pytest

lab: setup
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV) build *.egg-info
