"""The library for C has the same tokens, logits and states as the model, without Python."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections import Counter
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bkcore.model import StreamState
from tests.model.c_library import SOURCE, Library, Sampling, install, run

EXAMPLE = SOURCE / "examples" / "generate.c"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
GREEDY = Sampling(1, 0, 0, 1, 0)
FORMS = [(None, "float"), *((mode, "quantized") for mode in ("ptq_int8", "qat_int4"))]
FORMS += [("mixed_precision", "quantized")]


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed."""
    folder = tmp_path_factory.mktemp("installed")
    install(folder)
    return folder


@pytest.fixture(scope="session")
def library(prefix: Path) -> Library:
    (path,) = prefix.rglob("libbkcore.so")
    return Library(path)


class Opened(NamedTuple):
    """A model, its folder, and what the library made of it."""

    model: Any
    folder: Path
    engine: c_void_p


@pytest.fixture(params=FORMS, ids=lambda form: str(form[0]))
def opened(request: Any, build: Any, library: Library, tmp_path: Path) -> Any:
    model = build(*request.param, key_groups=2)
    model.save_pretrained(tmp_path / "model")
    engine = library.open(tmp_path / "model")
    yield Opened(model, tmp_path / "model", engine)
    library.c.bkcore_close(engine)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order in which float32 numbers are added: a few dozen in each sum."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_logits_and_states_are_those_of_the_model(library, opened, tokens, tmp_path):
    model, _, engine = opened
    ids, more = tokens(3, 20), tokens(3, 4)
    wanted = model(ids, use_cache=True)
    state = library.make("state_new", engine, c_int64(3))
    close(library.read(engine, state, ids), wanted.logits)
    path = tmp_path / "state"
    library.call("state_save", state, c_char_p(str(path).encode()))
    saved = StreamState.load(path)
    assert torch.equal(saved.seen, wanted.cache_params.seen)
    for found, layer in zip(saved.layers, wanted.cache_params.layers, strict=True):
        for name in ("taps", "g", "psi"):
            close(getattr(found, name), getattr(layer, name))
    # Each goes on from the other's file.
    close(model(more, cache_params=saved).logits, library.read(engine, state, more))
    wanted.cache_params.save(path)
    loaded = library.make("state_load", engine, c_char_p(str(path).encode()))
    close(
        library.read(engine, loaded, more, of_all=False),
        model(more, cache_params=wanted.cache_params).logits[:, -1],
    )
    library.c.bkcore_state_free(loaded)
    library.c.bkcore_state_free(state)


def test_the_most_probable_tokens_are_those_of_the_model(library, opened, tokens):
    model, _, engine = opened
    ids = tokens(2, 5)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    state = library.make("state_new", engine, c_int64(2))
    assert library.generate(engine, state, ids, 12, GREEDY) == wanted[:, 5:].tolist()
    library.c.bkcore_state_free(state)


def test_the_example_prints_the_tokens_of_the_model(prefix, opened, tokens, tmp_path):
    model, folder, _ = opened
    ids = tokens(1, 5)
    wanted = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 5:]
    program = compiled(prefix, tmp_path)
    found = run(program, folder, "9", *map(str, ids[0].tolist()))
    assert [int(line) for line in found.split()] == wanted.tolist()
    # What cannot be done is said in words.
    for arguments, said in (
        ((folder / "no", "9", "1"), "model.safetensors cannot be read: No such file"),
        ((folder, "9", "61"), "token 61 is not in [0, 61)"),
        ((folder, "0", "1"), "at least one token is generated, not 0"),
        ((folder, "9", "x"), "tokens are numbers"),
        ((folder, "9"), "usage"),
    ):
        result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (1, "")
        assert said in result.stderr


def compiled(prefix: Path, folder: Path) -> Path:
    (libraries,) = {path.parent for path in prefix.rglob("libbkcore.so")}
    program = folder / "generate"
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lbkcore"]
    run("cc", "-std=c99", *STRICT, EXAMPLE, f"-I{prefix / 'include'}", *link, "-o", program)
    return program


@pytest.mark.parametrize("language", ["c99", "c++11"])
def test_the_header_is_one_for_c_and_c_plus_plus(prefix, language, tmp_path):
    source = tmp_path / "include.c"
    source.write_text("#include <bkcore.h>\nint main(void) { return bkcore_version() == 0; }\n")
    compiler = ["cc", "-x", "c"] if language == "c99" else ["c++", "-x", "c++"]
    flags = [f"-std={language}", *STRICT, f"-I{prefix / 'include'}", "-fsyntax-only"]
    run(*compiler, *flags, source)


def test_cmake_and_pkg_config_find_the_library(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(user C)\n"
        "find_package(bkcore 0.1 REQUIRED)\n"
        f"add_executable(user {EXAMPLE})\ntarget_link_libraries(user bkcore::bkcore)\n"
    )
    build = tmp_path / "build"
    run("cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    usage = subprocess.run([build / "user"], capture_output=True, text=True, check=False)
    assert "usage" in usage.stderr
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (description,) = prefix.rglob("bkcore.pc")
    search = {**os.environ, "PKG_CONFIG_PATH": str(description.parent)}
    flags = run("pkg-config", "--cflags", "--libs", "bkcore", env=search).split()
    run("cc", EXAMPLE, *flags, "-o", tmp_path / "again")


def test_the_library_has_its_own_names_only_and_no_openmp(prefix):
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("readelf and nm are not installed")
    (path,) = prefix.rglob("libbkcore.so")
    lines = run("nm", "--dynamic", "--defined-only", path).splitlines()
    names = [line.split()[-1] for line in lines]
    header = (prefix / "include" / "bkcore.h").read_text()
    assert sorted(names) == sorted(re.findall(r"^BKCORE_API .*?\b(bkcore_\w+)\(", header, re.M))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", path))
    assert needed
    assert not [name for name in needed if re.match(r"lib(gomp|omp|iomp|python|torch)", name)]


def test_the_version_is_that_of_the_package(library):
    text = (SOURCE / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', text, re.M)
    assert version is not None
    assert library.c.bkcore_version().decode() == version[1]


def kept(logits: Tensor, sampling: Sampling, seen: list[int]) -> Tensor:
    """Probabilities (V) by the processors of transformers, in the order of `generate`."""
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    processors += [TemperatureLogitsWarper(sampling.temperature)]
    processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    processors += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    ids: Any = torch.tensor([seen], dtype=torch.int64)
    scores: Any = logits[None].clone()
    return LogitsProcessorList(processors)(ids, scores)[0].softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        (1.0, 1.0, 0, 1.0, 0.0),
        (1.5, 0.7, 0, 1.0, 0.0),
        (1.0, 2.0, 5, 1.0, 0.0),
        (1.0, 1.3, 0, 0.8, 0.0),
        (1.0, 1.3, 0, 1.0, 0.1),
        (0.7, 1.8, 12, 0.9, 0.05),
    ],
)
def test_tokens_are_drawn_as_transformers_would(library, settings):
    sampling, seen, draws = Sampling(*settings), [1, 1, 3, 8, 20], 3000
    logits = 2 * torch.randn(24)
    wanted = kept(logits, sampling, seen).double()
    found = Counter(library.sample(logits, sampling, seen, seed=7, count=draws))
    for token, p in enumerate(wanted.tolist()):
        if p == 0:
            assert found[token] == 0
        assert abs(found[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5 + 1e-9


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(library, opened, tokens):
    _, folder, engine = opened
    ids, sampling = tokens(1, 4).repeat(3, 1), Sampling(1.2, 1.1, 20, 0.95, 0.01)
    state = library.make("state_new", engine, c_int64(3))
    threaded = library.open(folder, threads=2)
    several = library.generate(engine, state, ids, 15, sampling, seed=40)
    for n, wanted in enumerate(several):
        one = library.make("state_new", threaded, c_int64(1))
        assert library.generate(threaded, one, ids[:1], 15, sampling, seed=40 + n) == [wanted]
        library.c.bkcore_state_free(one)
    assert several[0] != several[1]
    library.c.bkcore_close(threaded)
    library.c.bkcore_state_free(state)


def test_generation_ends_where_it_is_told_to(library, opened, tokens):
    _, _, engine = opened
    ids = tokens(2, 4)
    state = library.make("state_new", engine, c_int64(2))
    copy = library.make("state_copy", state)
    whole = library.generate(engine, state, ids, 10, GREEDY)
    stop = whole[0][6]
    until = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert library.generate(engine, copy, ids, 10, GREEDY, stops=[stop]) == until
    seen = (c_int64 * 2)()
    library.call("state_seen", copy, seen, c_int64(2))
    assert list(seen) == [4 + len(row) - 1 for row in until]
    again = library.make("state_new", engine, c_int64(2))
    first = library.generate(engine, again, ids, 10, GREEDY, goes_on=lambda n, token: n == 1)
    assert first == [whole[0][:1], whole[1]]
    for each in (state, copy, again):
        library.c.bkcore_state_free(each)


def test_what_cannot_be_opened_is_said_in_words(library, opened):
    made = c_void_p()
    open_ = library.c.bkcore_open
    status = open_(c_char_p(b"no"), c_int64(1), None, ctypes.byref(made))
    assert (status, made.value) == (2, None)
    assert library.c.bkcore_error_message().startswith(b"no/model.safetensors cannot be read")
    (opened.folder / "config.json").write_text("{}")
    folder = c_char_p(str(opened.folder).encode())
    assert open_(folder, c_int64(1), None, ctypes.byref(made)) == 2
    assert b"another kind of model" in library.c.bkcore_error_message()


def test_the_program_of_the_documentation_compiles(prefix, tmp_path):
    page = (SOURCE / "docs" / "c-library.md").read_text()
    (program,) = re.findall(r"^```c\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "page.c").write_text(program)
    flags = ["-std=c99", *STRICT, f"-I{prefix / 'include'}", "-fsyntax-only"]
    run("cc", *flags, tmp_path / "page.c")
