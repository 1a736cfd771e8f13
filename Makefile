# Every target works from a bare python3 >= 3.11: the first one to run builds .venv, and it is refreshed
# only when setup.cfg, pyproject.toml or constraints.txt have changed.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Idle OpenMP threads otherwise spin, which slows everything else on a machine with few cores.
export OMP_WAIT_POLICY := PASSIVE

# glibc gives large buffers back to the system at each free and pays for them again in page faults: 15 % of a UNet step.
bench bench-speed: export MALLOC_MMAP_MAX_ := 0
bench bench-speed: export MALLOC_TRIM_THRESHOLD_ := 34359738368

.PHONY: demo web test test-slow test-web test-batch mutants check bench bench-score bench-wordings bench-exactness bench-samplers bench-speed docs install clean

demo: $(STAMP)          ## draw eight dense prompts with the miniature
	$(PY) -m benchmarks.demo

web: $(STAMP)-web       ## serve the page with the miniature; ARGS as ella-kd web takes them
	$(PY) -m ella_kd web --models-dir models/miniature/addons $(ARGS)

test: $(STAMP)          ## every test but the slow ones
	$(PY) -m pytest -n auto $(ARGS)

test-slow: $(STAMP)     ## the tests that take minutes or gigabytes
	$(PY) -m pytest -m slow $(ARGS)

test-batch: $(STAMP)    ## batches that are killed, and on a Ray cluster of two nodes on this machine
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[batch]'
	$(PY) -m pytest -m slow tests/test_batch_kills.py tests/cluster $(ARGS)

test-web: $(STAMP)-web-test  ## drive the page in a browser, which is installed where there is none
	$(PY) tests/web/browser.py
	$(PY) -m pytest -m web tests/web $(ARGS)

mutants: $(STAMP)       ## plant 300 small faults, one at a time: which do the tests not notice?
	$(PY) tests/mutants.py $(ARGS)

check: $(STAMP)         ## lint and types
	$(PY) -m ruff check .
	$(PY) -m mypy

bench-score: $(STAMP)   ## the semantic score; ARGS=--publish replaces the tables on file, --help tells the rest
	$(PY) -m benchmarks.score $(ARGS)

bench-wordings: $(STAMP)  ## the score when the same scenes are said otherwise
	$(PY) -m benchmarks.wordings $(ARGS)

bench-exactness: $(STAMP) ## what it is worth that connector and UNet see one timestep
	$(PY) -m benchmarks.exactness $(ARGS)

bench-samplers: $(STAMP)  ## the samplers' orders and the driver's own time
	$(PY) -m benchmarks.samplers $(ARGS)

bench-speed: $(STAMP)   ## steps per second
	$(PY) -m benchmarks.steps_per_second $(ARGS)

bench: $(STAMP)         ## all five; ARGS that all of them understand
	$(if $(filter-out --publish --out=%,$(ARGS)),$(error make bench takes ARGS=--publish or ARGS=--out=DIR; for other options name one: make bench-score, bench-wordings, bench-exactness, bench-samplers, bench-speed))
	$(PY) -m benchmarks.score $(ARGS)
	$(PY) -m benchmarks.wordings $(ARGS)
	$(PY) -m benchmarks.exactness $(ARGS)
	$(PY) -m benchmarks.samplers $(ARGS)
	$(PY) -m benchmarks.steps_per_second $(ARGS)

# NO_MKDOCS_2_WARNING: an advertisement in every build.
docs: $(STAMP)-docs    ## the documentation as a site, in site/: no server, nothing from elsewhere
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --clean $(ARGS)

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("ella_kd needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(PY) -m pip install --quiet --no-deps k-diffusion==0.1.1.post1 spandrel==0.4.2
	@touch $@

$(STAMP)-docs $(STAMP)-web $(STAMP)-web-test: $(STAMP)-%: $(STAMP)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
