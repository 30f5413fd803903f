# make demo   set up .venv and run the main job
# make bench  set up .venv and time the kernels
# make test   set up .venv and run lint, types and all tests

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo bench test setup clean

demo: setup
	$(BIN)/bkcore demo $(ARGS)

bench: setup
	$(BIN)/bkcore bench kernels $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

setup: .venv/.installed

# Sources of the native code only: the installation is editable, so Python changes are live.
.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
		echo "bkcore compiles a small C++ extension and found no C++17 compiler."; \
		echo "Install one (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++';"; \
		echo "macOS: 'xcode-select --install'), or name one in the variable CXX."; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bkcore needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv || { echo "The venv module is missing (Debian, Ubuntu: 'apt install python3-venv')."; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build
