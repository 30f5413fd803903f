"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

# As the command `bkcore` does (bkcore/__main__.py), before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton's kernels are tested in its interpreter where there is no GPU. It has to know before
# anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says more about the machine than about the code. In CI the examples are
# the same every time, so that a change is judged by what it changes.
settings.register_profile(
    "bkcore",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("bkcore")

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "wikitext-2"


@pytest.fixture(scope="session")
def wikitext_dir() -> Path:
    """Return the folder with WikiText-2; skip where it is absent, fail where CI lacks it."""
    if not WIKITEXT.is_dir():
        reason = "WikiText-2 is not beside the repository (../shared/wikitext-2)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return WIKITEXT
