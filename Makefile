# make demo         set up .venv and run the main job
# make bench        set up .venv and time the kernels
# make check        set up .venv and run lint, types and the fast tests
# make test         set up .venv and run lint, types and all tests but the slow ones
# make test-slow    set up .venv and run the slow tests: the same promises for more sizes and forms
# make test-runtime install bkcore-runtime alone, without PyTorch, and run it
# make test-cpp     the tests in C++, which `make test` runs, too; they need CMake and doctest
# make test-arm     these for aarch64, cross-compiled and run in qemu (g++-aarch64-linux-gnu, qemu-user)
# make docs         set up .venv and build the documentation in build/site, links checked
# make tables       write the tables of the documentation again, from docs/data
# make test-lowest  set up .venv-lowest with the lowest versions allowed and run the tests of LOWEST
# make sanitize     the tests in C++ and ROUNDS rounds of the fuzzers from SEED on, under sanitizers
# make coverage     `make test`, and what the tests run through, lines and branches, by package
# make coverage-cpp what the tests in C++ run through, lines and branches, by gcov

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# Every dependency is in use there: the kernels, models that are saved, loaded, trained, quantized and
# compared, the tokenizer, data sets, plots, Triton and the commands. All tests would take too long.
LOWEST := tests/runtime tests/test_*interface.py tests/test_imports.py tests/test_versions.py \
	tests/core tests/kernels/ops/test_sweep.py tests/kernels/ops/test_sweep_step.py \
	tests/kernels/backends/test_triton.py::test_equals_the_cpu_backend_on_any_shape \
	tests/comparison/test_selective_scan.py tests/model/test_saving_and_loading.py \
	tests/model/test_language_model.py tests/commands/test_train.py tests/text \
	tests/training/test_trainer.py

ROUNDS ?= 2000
SEED ?= 1
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo bench lint check test test-slow test-runtime test-cpp test-arm test-lowest sanitize coverage \
	coverage-cpp docs docs-serve tables setup clean

demo: setup
	$(BIN)/bkcore demo $(ARGS)

bench: setup
	$(BIN)/bkcore bench kernels $(ARGS)

# A process a core, with a thread each.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(foreach folder,csrc csrc/tests csrc/engine \
		csrc/engine/include csrc/tests/engine examples,$(folder)/*.h $(folder)/*.c $(folder)/*.cpp))

check: lint
	$(subst python,$(BIN)/python,$(PYTEST)) -m "fast and not slow" $(ARGS)

test: lint test-cpp
	$(subst python,$(BIN)/python,$(PYTEST)) -m "not slow" \
		$(if $(COVERAGE),--cov --cov-report=json:$(measured)) $(ARGS)
	$(if $(COVERAGE),$(BIN)/python tests/coverage_table.py $(measured))

test-slow: setup
	$(subst python,$(BIN)/python,$(PYTEST)) -m slow $(ARGS)

# The wheel, in an environment that has nothing else.
test-runtime: alone := build/runtime
test-runtime:
	rm -rf $(alone)
	$(PYTHON) -m venv $(alone)
	$(alone)/bin/python -m pip install --quiet --upgrade pip
	$(alone)/bin/python -m pip wheel --quiet --no-deps --build-constraint constraints.txt \
		-w $(alone)/wheel ./runtime
	$(alone)/bin/python -m pip install --quiet -c constraints.txt $(alone)/wheel/*.whl
	$(alone)/bin/python tests/runtime/alone.py checkpoints/wikitext2

measured := build/coverage/report.json

coverage: COVERAGE := 1
coverage: test

test-cpp:
ifneq ($(or $(CI),$(shell command -v cmake)),)
	$(call build-cpp,cpp,check,-DCMAKE_BUILD_TYPE=Release)
else
	@echo "The C++ tests are left out, as CMake is not installed: apt install cmake doctest-dev"
endif

test-arm:
	$(call build-cpp,arm,check,-DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=csrc/tests/aarch64.cmake)

sanitize:
	$(call build-cpp,sanitize,check,-DBKCORE_INSTRUMENT=sanitize)
	$(call build-cpp,sanitize,fuzzers,-DBKCORE_INSTRUMENT=sanitize)
	build/sanitize/csrc/tests/fuzz $(ROUNDS) $(SEED)
	build/sanitize/csrc/tests/fuzz_engine $(ROUNDS) $(SEED)

gcovr := $(BIN)/gcovr --root . --filter csrc/ --exclude csrc/tests/ --object-directory build/coverage-cpp

coverage-cpp: setup
	$(call build-cpp,coverage-cpp,check,-DBKCORE_INSTRUMENT=coverage)
	$(gcovr)
	$(gcovr) --txt-metric branch --exclude-throw-branches --exclude-unreachable-branches

# build-cpp FOLDER, TARGET, OPTIONS: configure the kernels without Python, and build a target.
define build-cpp
	cmake --log-level=WARNING -S . -B build/$(1) $(3) -DBKCORE_PYTHON=OFF -DBKCORE_TESTS=ON \
		$(if $(CI),-DCMAKE_REQUIRE_FIND_PACKAGE_doctest=ON)
	cmake --build build/$(1) --parallel $(JOBS) --target $(2)
endef
# Material for MkDocs warns of MkDocs 2, which pyproject.toml excludes.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: setup
	$(BIN)/python -m mkdocs build --strict

docs-serve: setup
	$(BIN)/python -m mkdocs serve

tables: setup
	$(BIN)/python -m docs.tables
	$(BIN)/python -m docs.picture

test-lowest: .venv-lowest/.installed
	$(subst python,.venv-lowest/bin/python,$(PYTEST)) $(LOWEST) $(ARGS)

setup: .venv/.installed

# Sources of the native code only: the installation is editable, so Python changes are live.
native := pyproject.toml runtime/pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/engine/*.*)

.venv/.installed: constraints.txt $(native)
	$(call install,constraints.txt,dev,build/{wheel_tag})

.venv-lowest/.installed: constraints-lowest.txt $(native)
	$(call install,constraints-lowest.txt,test,build/lowest)

# install CONSTRAINTS, EXTRA, BUILD FOLDER: make the environment that the target lies in.
define install
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
		echo "bkcore compiles a small C++ extension and found no C++17 compiler."; \
		echo "Install one (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++';"; \
		echo "macOS: 'xcode-select --install'), or name one in the variable CXX."; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bkcore needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(@D) || { echo "The venv module is missing (Debian, Ubuntu: 'apt install python3-venv')."; exit 1; }
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -c $(1) --build-constraint $(1) -C build-dir=$(3) \
		-e ./runtime -e '.[$(2)]'
	touch $@
endef

clean:
	rm -rf .venv .venv-lowest build runtime/build
