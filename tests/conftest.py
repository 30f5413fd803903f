"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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
