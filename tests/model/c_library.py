"""The library for C, compiled and installed for tests, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

SOURCE = Path(__file__).resolve().parents[2]
BUILD = SOURCE / "build" / "cpp"
OPTIONS = ["-DCMAKE_BUILD_TYPE=Release", "-DBKCORE_PYTHON=OFF", "-DBKCORE_TESTS=ON"]


def run(*command: str | Path, **options: Any) -> str:
    """Run a program that must succeed, and return what it prints."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def install(prefix: Path) -> None:
    """Compile the library where `make test-cpp` does, and install it.

    The first time this takes a minute, unless make has compiled the kernels before.
    """
    if sys.platform != "linux":
        pytest.skip("the tests know how files of libraries are named on Linux")
    if not (SOURCE / "csrc").exists():
        pytest.skip("the sources of the library are not here")
    for program in ("cmake", "cc", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "pytest.lock"):  # other workers of pytest build here, too
        run("cmake", "-S", SOURCE, "-B", BUILD, *OPTIONS, "-DBKCORE_LIBRARY=ON")
        jobs = str(os.cpu_count() or 1)
        run("cmake", "--build", BUILD, "--parallel", jobs, "--target", "bkcore")
        run("cmake", "--install", BUILD, "--prefix", prefix)


class Sampling(ctypes.Structure):
    """`bkcore_sampling`."""

    _fields_ = [
        ("repetition_penalty", c_double),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
    ]


class Generation(ctypes.Structure):
    """`bkcore_generation`."""

    _fields_ = [
        ("most_tokens", c_int64),
        ("stops", ctypes.POINTER(c_int64)),
        ("stop_count", c_int64),
        ("sampling", Sampling),
        ("seed", c_uint64),
    ]


OnToken = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64, c_int64)


class Library:
    """What the tests need of the library, with tensors."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name in ("version", "error_message", "isa"):
            getattr(self.c, f"bkcore_{name}").restype = c_char_p
        self.c.bkcore_default_sampling.restype = Sampling
        for name in ("close", "state_free", "sampler_free"):
            getattr(self.c, f"bkcore_{name}").restype = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that must succeed."""
        status = getattr(self.c, f"bkcore_{name}")(*arguments)
        assert status == 0, self.c.bkcore_error_message().decode()

    def make(self, name: str, *arguments: Any) -> c_void_p:
        """Call a function whose last argument is a place for what it makes."""
        made = c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def open(self, folder: Path, threads: int = 1, isa: str | None = None) -> c_void_p:
        name = None if isa is None else c_char_p(isa.encode())
        return self.make("open", c_char_p(str(folder).encode()), c_int64(threads), name)

    def size(self, engine: c_void_p, quantity: int) -> int:
        found = c_int64()
        self.call("size", engine, c_int(quantity), ctypes.byref(found))
        return found.value

    def read(self, engine: c_void_p, state: c_void_p, ids: Tensor, of_all: bool = True) -> Tensor:
        """Logits (B, N, V) of ids (B, N), or (B, V) of the last."""
        batch, sites = ids.shape
        shape = (batch, sites) if of_all else (batch,)
        logits = torch.empty(*shape, self.size(engine, 0))
        self.call(
            "read_all" if of_all else "read",
            engine,
            state,
            c_void_p(ids.contiguous().data_ptr()),
            c_int64(batch),
            c_int64(sites),
            c_void_p(logits.data_ptr()),
            c_int64(logits.numel()),
        )
        return logits

    def generate(
        self,
        engine: c_void_p,
        state: c_void_p,
        ids: Tensor,
        most: int,
        sampling: Sampling,
        stops: Sequence[int] = (),
        seed: int = 0,
        goes_on: Callable[[int, int], bool] = lambda sequence, token: True,
    ) -> list[list[int]]:
        """Continue ids (B, N)."""
        found: list[list[int]] = [[] for _ in ids]

        def on_token(context: object, sequence: int, token: int) -> int:
            found[sequence].append(token)
            return goes_on(sequence, token)

        generation = Generation(most, (c_int64 * len(stops))(*stops), len(stops), sampling, seed)
        ids = ids.contiguous()
        self.call(
            "generate",
            engine,
            state,
            c_void_p(ids.data_ptr()),
            c_int64(ids.shape[0]),
            c_int64(ids.shape[1]),
            ctypes.byref(generation),
            OnToken(on_token),
            None,
        )
        return found

    def sample(
        self, logits: Tensor, sampling: Sampling, seen: Sequence[int], seed: int, count: int
    ) -> list[int]:
        """Draw from logits (V) with seeds from `seed` on, each time as if it was the first."""
        vocabulary = c_int64(len(logits))
        values = (c_float * len(logits))(*logits.tolist())
        tokens = []
        for n in range(count):
            sampler = self.make(
                "sampler_new", vocabulary, ctypes.byref(sampling), c_uint64(seed + n)
            )
            token = c_int64()
            ids = (c_int64 * len(seen))(*seen)
            self.call("sampler_see", sampler, ids, c_int64(len(seen)))
            self.call("sampler_sample", sampler, values, vocabulary, ctypes.byref(token))
            self.c.bkcore_sampler_free(sampler)
            tokens.append(token.value)
        return tokens
