# make tables: set everything up and make both tables' embedded columns, with images.
# make test:   set everything up and run the tests.
# make lab:    the notebooks in JupyterLab.
# make docs:   the API reference and the pages of docs/, into build/docs; stops at a warning or a broken link.
# make app:    the explorer (notebook 09) as a page of its own, without code.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PROFILE ?= embedded

.PHONY: setup fetch tables test lab app docs clean

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

app: fetch
	$(BIN)/voila notebooks/09_explore_similarity.ipynb --TagRemovePreprocessor.remove_cell_tags=details

docs: setup
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) build *.egg-info
