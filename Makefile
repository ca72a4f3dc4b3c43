# make demo    create the environment (once) and train, sample and evaluate one model; make test: create it and run the tests
# PYTHON=python3.12 make demo chooses the interpreter that the environment is made with.
PYTHON ?= python3
VENV := .venv
LOCK := $(shell sha256sum requirements.lock | cut -c1-12)
READY := $(VENV)/.installed-$(LOCK)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo ablations test check report adopt venv
.DELETE_ON_ERROR:

demo: venv
	@echo "== Running the workflow of one model (what is up to date stays as it is)"
	snakemake --profile local --config 'run=[mnist_demo]'
	@echo && cat results/tables/comparison.md
	@echo "== Tables: results/tables/  figures: results/figures/  images: $$(echo results/models/*/samples.png)"

# Two cells at a time on two cores. Snakemake looks through its queue once per timespan for each job that has ended: with
# the usual second, that takes a core after some hundred jobs.
ablations: venv
	snakemake --cores all --keep-going --rerun-incomplete --show-failed-logs --max-jobs-per-timespan 1000/1m ablations_of_mnist_demo
	@echo && cat results/tables/ablations/*.md

# A worker more than cores: the tests of Slurm mostly wait. Files in the order of tests/conftest.py, the longest first.
test: venv
	@echo "== Running the tests"
	OMP_NUM_THREADS=1 python -m pytest -q -n $$(python -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))') \
		--dist loadfile --no-loadscope-reorder tests

check: venv
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	lint-imports

report: venv
	snakemake --report report.html

# After `dvc checkout` of another revision: the files in the workspace are up to date.
adopt: venv
	python workflow/scripts/adopt.py

venv: $(READY)

# The environment is made anew when the lock changes.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The locked environment needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "== Installing what requirements.lock names into $(VENV) (some minutes, 2 to 6 GB)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@
