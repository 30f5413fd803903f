"""The streaming benchmark, on a small model."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from bkcore.bench import stream
from bkcore.errors import BenchmarkError, InputError

SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 1,
    "num_experts": 1,
    "experts_per_token": 1,
    "expert_size": 32,
    "num_heads": 2,
    "key_size": 8,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MODEL", SMALL)
    monkeypatch.setattr(stream, "_PAIRS", 20)


def test_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    result = stream.run_stream(Console(quiet=True), 20_000)
    assert (result.young, result.old) == (1_000, 20_000)
    # 3 taps of 64 channels, and Re and Im of g and of psi, 8 x 16, for 2 heads; all float32.
    assert result.state_bytes == 4 * (3 * 64 + 2 * 2 + 2 * 2 * 8 * 16)
    assert 0 < result.young_microseconds < 1e6
    assert 0.1 < result.ratio < 10
    said = stream.summary(result)
    assert "at 20,000: " in said
    assert f"takes {result.state_bytes / 1e3:,.0f} KB at both" in said
    assert f"changed by {result.resident_growth_bytes / 1e6:+.1f} MB" in said
    json.dumps(stream.report(result))


def test_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = stream._next

    def forgetful(model, ids, state):
        return true(model, ids, model.first_state() if ids.numel() == 1 else state)

    monkeypatch.setattr(stream, "_next", forgetful)
    with pytest.raises(BenchmarkError, match="differ by"):
        stream.run_stream(Console(quiet=True), 8_000)


def test_a_state_that_grows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_bytes", lambda state: int(state.seen))
    with pytest.raises(BenchmarkError, match="1000 bytes after 1000 tokens, but 8000 after 8000"):
        stream.run_stream(Console(quiet=True), 8_000)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(InputError, match="at least 8000"):
        stream.run_stream(Console(quiet=True), 100)
    assert torch.is_grad_enabled()
