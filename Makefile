# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := digits_cnn6_tanh_cosine

.PHONY: demo test floors lint bench setup clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup  ## Train, test, export, load and use a decoupled CNN on real digits.
	rm -rf outputs/demo
	$(RUN) train.py fit --config configs/$(DEMO).yaml --checkpoint.dirpath outputs/demo
	$(RUN) train.py test --config configs/$(DEMO).yaml --ckpt_path outputs/demo/last.ckpt
	$(RUN) -m zoo export outputs/demo/last.ckpt $(DEMO) --to outputs/demo
	$(RUN) -m zoo demo outputs/demo/$(DEMO) --output outputs/demo.png

test: setup lint  ## Run all tests but the slow sweeps.
	$(RUN) -m pytest -m "not slow" --numprocesses auto --dist loadfile --durations 10

floors: setup  ## Run the tests with every dependency at the lowest version that pyproject.toml allows.
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv venv --quiet --clear --python $(RUN) $(VENV)-floors
	$(VENV)/bin/uv pip install --quiet --python $(VENV)-floors/bin/python --resolution lowest-direct --editable '.[dev]'
	$(VENV)-floors/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: setup  ## Measure layers, networks and checkpoints beside their plain twins, and write the pages.
	$(RUN) -m benchmarks.operators
	$(RUN) -m benchmarks.models
	$(RUN) -m benchmarks.pipeline
	$(RUN) -m benchmarks.checkpoints
	$(RUN) -m benchmarks.report
	$(RUN) -m zoo reports

clean:
	rm -rf $(VENV) $(VENV)-floors outputs
