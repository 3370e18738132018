# make demo   install everything into .venv and run the main job, without the studies, on the embedded cohort
# make test   install everything and run every test but the slow ones
# make test-slow  install everything and run the slow tests: loads, kills, whole studies and simulations
# make docs   build the documentation site into _docs
# make example  run the demo and take its report, and a picture of it (needs chromium), into nbs/
# make lock   write the newest versions within the bounds of settings.ini to constraints.txt, and then lock-serving (needs uv)
# make lock-serving  write those of them that serving needs, with hashes, to deploy/requirements.txt (needs uv)
# make clean  remove .venv and what was built

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: demo test test-slow docs example lock lock-serving clean install
install: $(READY)

# The stamp is written last, so an interrupted install is repeated, and a complete one is not.
$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import shutil; free = shutil.disk_usage(".").free/1e9; free < 11 and print(f"Only {free:.1f} GB are free here: the installation takes 6.8, and with pip 3 more while it runs.")' >&2
	@echo "Installing into $(VENV): 6.8 GB, most of it torch with its CUDA libraries. It takes about half a minute"
	@echo "with uv and 3 minutes with pip, and longer over a slow line. The next call of make skips it."
ifneq ($(UV),)
	@test -x $(PY) || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(UV) pip install --python $(PY) --compile-bytecode -c constraints.txt -e '.[dev]'
else
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null    # uv makes environments without pip
	$(PY) -m pip install --disable-pip-version-check --compile -c constraints.txt -e '.[dev]'
endif
	@touch $@

demo: $(READY)
	$(VENV)/bin/clot demo --quick

test: $(READY)
	$(PY) -m pytest

test-slow: $(READY)
	$(PY) -m pytest -m slow

docs: $(READY)
	$(PY) tools/build_site.py

example: $(READY)
	$(PY) tools/example.py

lock:
	$(if $(UV),,$(error make lock needs uv))
	$(PYTHON) -c "import configparser; c = configparser.ConfigParser(); c.read('settings.ini'); d = c['DEFAULT']; print('\n'.join(' '.join(d[k] for k in d if k.endswith('requirements')).split()))" \
	  | $(UV) pip compile --universal --upgrade --python-version 3.11 --no-header --no-annotate --quiet - -o constraints.txt
	$(MAKE) lock-serving

lock-serving:
	$(if $(UV),,$(error make lock-serving needs uv))
	$(PYTHON) -c "import configparser; c = configparser.ConfigParser(); c.read('settings.ini'); print('\n'.join(c['DEFAULT']['serving_requirements'].split()))" \
	  | $(UV) pip compile --universal --python-version 3.11 -c constraints.txt --generate-hashes --no-header --no-annotate --quiet - -o deploy/requirements.txt

clean:
	rm -rf $(VENV) _docs build dist *.egg-info
