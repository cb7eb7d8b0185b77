# `make demo` and `make test` each build .venv when it is missing; nothing else need be typed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-cluster lint bench clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dicom,cloud,onnx,tune,test]'
	touch $@

demo: .venv/.ready
	$(BIN)/python -m pgl_ray.demo

test: .venv/.ready
	$(BIN)/python -m pytest --durations=4 -n 2 --dist loadfile -m "not (slow or cluster)"
	$(MAKE) -j 2 test-slow test-cluster

# side by side: Ray jobs, which take longer, leave a core idle a quarter of the time
test-slow: .venv/.ready
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest --durations=8 -m slow

test-cluster: .venv/.ready
	$(BIN)/python -m pytest --durations=8 -m cluster

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready
	PGL_RAY_BENCH=1 $(BIN)/python -m pytest -q -s tests/benchmarks

clean:
	rm -rf .venv
