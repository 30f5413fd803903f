"""Fixtures and settings that several folders of tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# As the command `bkcore` does (bkcore/__main__.py), before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.poison import poisoned_memory

# Without a GPU, the Triton kernels are tested in Triton's interpreter. This must be set before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says more about the machine than about the code. In CI the examples are
# always the same, so that a failure comes from a change and not from other examples.
settings.register_profile(
    "bkcore",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("bkcore")

FAST = (
    *("core", "kernels/ops", "kernels/test_checks.py", "kernels/backends/test_cpu.py"),
    *("kernels/backends/cpu/test_native.py", "kernels/backends/test_selection.py", "quantization"),
    *("text/test_windows.py", "text/test_saved.py", "text/test_shards.py", "display"),
    *("model/test_language_model.py", "model/test_mixer.py", "training/test_schedule.py"),
    *(
        "training/test_optimizer.py",
        "training/test_trainer_divergence.py",
        "evaluation/test_perplexity.py",
    ),
    *("test_imports.py", "test_arguments.py", "test_deprecated.py", "runtime"),
    *("test_host.py", "test_versions.py", "test_first_interface.py"),
)
"""Files and folders whose tests `make check` runs."""

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "wikitext-2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST`."""
    folders = [Path(__file__).parent / name for name in FAST]
    missing = [str(folder) for folder in folders if not folder.exists()]
    assert not missing, f"FAST names what is not there: {missing}"
    for item in items:
        if any(item.path == folder or folder in item.path.parents for folder in folders):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session", autouse=True)
def poisoned() -> Iterator[None]:
    """Have reading what was never written go wrong in every test."""
    with poisoned_memory():
        yield


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what lives as long as the tests: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def wikitext_dir() -> Path:
    """Return the folder with WikiText-2. If it is missing, skip the test, or in CI fail."""
    if not WIKITEXT.is_dir():
        reason = "WikiText-2 is not beside the repository (../shared/wikitext-2)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return WIKITEXT
