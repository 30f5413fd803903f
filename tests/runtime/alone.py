"""What `make test-runtime` runs in an environment that only bkcore-runtime was installed in.

Usage: alone.py CHECKPOINT. It prints the sizes of what was installed, and how long a process takes
from its start to the first token.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

PROMPT = " The river rises in"
GREEDY = (
    " The river rises in the area . The river 's population is the largest river in the region . \n"
    " The river 's population is the largest river in the United States . The river 's population "
    "is the largest river in the region . The river 's"
)
"""What the shipped checkpoint makes of the prompt in 60 tokens, the likeliest each time."""

HEAVY = ("torch", "transformers", "safetensors", "numpy", "bkcore")

MOST = 80
"""MB that may be installed, without pip and setuptools: tokenizers has 12, and what it asks for and
nobody imports here, huggingface-hub above all, 33."""

OF_PIP = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")


def check_library(folder: Path) -> None:
    from bkcore_runtime import CheckpointError, InputError, load

    engine, tokenizer = load(folder)
    ids = tokenizer.encode(PROMPT)
    assert PROMPT + "".join(tokenizer.stream(engine.generate(ids, 60), after=ids)) == GREEDY
    whole, steps = engine.start(), engine.start()
    expected = list(engine.generate(ids, 5, state=whole))
    for each in ids:
        (last,) = engine.generate([each], 1, state=steps)
    assert last == expected[0]
    with suppress(InputError):
        engine.read(whole, [ids])
        raise AssertionError("arrays came from nowhere")
    with suppress(CheckpointError):
        load(folder / "nothing")
        raise AssertionError("a checkpoint that is not there was loaded")


def command(folder: Path, *options: str) -> list[str]:
    run = str(Path(sysconfig.get_path("scripts")) / "bkcore-run")
    return [run, str(folder), "--prompt", PROMPT, "--temperature", "0", *options]


def time_to_first_token(folder: Path) -> float:
    """Seconds from the start of a process to the first text behind the prompt."""
    started = time.perf_counter()
    with subprocess.Popen(command(folder), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(len(PROMPT) + 1)
        took = time.perf_counter() - started
        process.stdout.read()
    return took


def installed() -> Counter[str]:
    """MB of what is installed, by its folder or file."""
    place = Path(sysconfig.get_path("purelib"))
    sizes: Counter[str] = Counter()
    for path in place.rglob("*"):
        name = path.relative_to(place).parts[0]
        if path.is_file() and not name.startswith(OF_PIP):
            sizes[name] += path.stat().st_size
    return sizes


def main(folder: Path) -> None:
    found = [name for name in HEAVY if importlib.util.find_spec(name)]
    assert not found, f"{found} can be imported, so that this shows nothing"
    check_library(folder)
    done = subprocess.run(command(folder), capture_output=True, text=True, check=True)
    assert done.stdout == GREEDY + "\n", done.stdout
    times = [time_to_first_token(folder) for _ in range(10)]
    print(
        f"from start to first token: {min(times):.2f} s at best of ten, "
        f"{statistics.median(times):.2f} in the median"
    )
    sizes = installed()
    total = sum(sizes.values()) / 1e6
    largest = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.most_common(6))
    print(f"installed without pip and setuptools: {total:.1f} MB, among them {largest}")
    assert total < MOST


if __name__ == "__main__":
    main(Path(sys.argv[1]))
