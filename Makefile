# make demo   install everything into .venv and run the main job on the embedded cohort
# make test   install everything and run every test
# make docs   build the documentation site into _docs
# make lock   write the newest versions within the bounds of settings.ini to constraints.txt (needs uv)
# make clean  remove .venv and what was built

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: demo test docs lock clean install
install: $(READY)

# The stamp is written last, so an interrupted install is repeated, and a complete one is not.
$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
ifneq ($(UV),)
	@test -x $(PY) || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(UV) pip install --quiet --python $(PY) --compile-bytecode -c constraints.txt -e '.[dev]'
else
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null    # uv makes environments without pip
	$(PY) -m pip install --quiet --disable-pip-version-check --compile -c constraints.txt -e '.[dev]'
endif
	@touch $@

demo: $(READY)
	$(VENV)/bin/clot demo

test: $(READY)
	$(PY) -m pytest

docs: $(READY)
	$(PY) tools/build_site.py

lock:
	$(if $(UV),,$(error make lock needs uv))
	$(PYTHON) -c "import configparser; c = configparser.ConfigParser(); c.read('settings.ini'); d = c['DEFAULT']; print('\n'.join((d['requirements'] + ' ' + d['dev_requirements']).split()))" \
	  | $(UV) pip compile --universal --upgrade --python-version 3.11 --no-header --no-annotate --quiet - -o constraints.txt

clean:
	rm -rf $(VENV) _docs build dist *.egg-info
