"""The inference benchmark, on small models."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from rich.console import Console

from bkcore.bench import inference, rival_models, settings
from bkcore.bench.result import report
from bkcore.errors import BenchmarkError, InputError
from bkcore.kernels.backends import cpu, selection
from bkcore.model import ResNetBKForCausalLM

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WIDTHS", (32,))
    monkeypatch.setattr(inference, "SEQUENCES", (1, 3))
    monkeypatch.setattr(inference, "CONTEXTS", (8, 16))
    monkeypatch.setattr(inference, "LAYERS", ((16, 8), (33, 7)))
    monkeypatch.setattr(inference, "ROWS", (1, 5))
    monkeypatch.setattr(inference, "_PREFILL_WIDTH", 32)
    monkeypatch.setattr(inference, "_DECODE_WIDTH", 32)
    monkeypatch.setattr(inference, "_SERVING_WIDTH", 32)
    monkeypatch.setattr(inference, "_RIVAL_WIDTH", 32)
    monkeypatch.setattr(inference, "_LOOP_WIDTH", 32)
    monkeypatch.setattr(inference, "_LOOP", 5)
    monkeypatch.setattr(inference, "_VOCABULARY", 64)
    monkeypatch.setattr(inference, "_LAYERS", 1)
    monkeypatch.setattr(inference, "_WINDOW", 32)
    monkeypatch.setattr(inference, "_CALIBRATION", (2, 40))
    monkeypatch.setattr(rival_models, "_WIDTH", 64)
    monkeypatch.setattr("bkcore.bench.timing.SECONDS", 1e-3)
    monkeypatch.setattr("bkcore.bench.timing._ROUNDS", 1)
    monkeypatch.setattr(inference, "build", cache(inference.build))


def test_every_case_and_its_target() -> None:
    results = inference.run_inference(QUIET)
    rows = {(row.name, row.threads): row for row in results}
    threads = sorted({1, min(2, torch.get_num_threads())})
    for count in threads:
        assert rows["prefill 32 INT8", count].target == 2.0
        assert rows["prefill 32 INT4", count].target == 1.5
        assert rows["prefill 32 float32 by oneDNN", count].target is None
        assert rows["decode 32 INT8", count].target == 1.5
        assert rows["decode 32 INT4", count].target == 2.0
    single = [row for row in results if row.name == "layer INT4" and row.threads == 1]
    assert [row.shape for row in single] == [(1, 8, 16), (5, 8, 16), (1, 7, 33), (5, 7, 33)]
    assert {(row.name, row.shape, row.baseline) for row in results if "model." in row.name} == {
        (f"model.{loop} {mode}", (1, 5), "bkcore_runtime")
        for loop in ("stream", "generate")
        for mode in ("float32", "INT8", "INT4")
    }
    served = [row for row in results if row.name.startswith("serving")]
    assert {row.shape[0] for row in served} == {1, 3}
    assert all("tokens a second" in row.note for row in served)
    against = {row.baseline for row in results if " at " in row.name}
    assert against == {"GPT-2 float32", "GPT-2 INT8", "Mamba float32", "Mamba INT8"}
    assert {row.name for row in results if " at " in row.name} == {
        f"{kind} at {context} {mode}"
        for kind in ("prefill", "decode")
        for context in (8, 16)
        for mode in ("float32", "INT8", "INT4")
    }
    assert all(row.seconds > 0 and row.baseline_seconds > 0 for row in results)
    json.dumps(report(results))


def test_a_slow_prefill_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_MOST_SECONDS", 1e-9)
    names = [row.name for row in inference.against_rivals((8, 16), 1)]
    assert "prefill at 8 INT8" in names
    assert "prefill at 16 INT8" not in names
    assert "decode at 16 INT8" in names


def test_another_text_in_another_loop_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true: Any = ResNetBKForCausalLM.generate

    def other(self, *arguments, **options):
        return true(self, *arguments, **options) + 1

    monkeypatch.setattr(ResNetBKForCausalLM, "generate", other)
    with pytest.raises(BenchmarkError, match="INT8: the loops write different texts"):
        list(inference.loops(1))


def test_wrong_products_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = cpu.BACKEND.product

    def wrong(args):
        return true(args) * 1.0001

    backends = selection._BACKENDS | {"cpu": replace(cpu.BACKEND, product=wrong)}
    monkeypatch.setattr(selection, "_BACKENDS", backends)
    with pytest.raises(BenchmarkError, match="differs from that of the reference"):
        inference.build(32)


def test_a_forgetful_stream_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = inference.build(32)["float32"]
    true = model.forward

    def forgetful(ids, cache_params=None, **options):
        state = cache_params and model.first_state()
        return true(ids, cache_params=state, **options)

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(BenchmarkError, match="streamed token"):
        inference.check_stream(model)


def test_rivals_have_as_many_parameters() -> None:
    for rival in rival_models.build(2_000_000, 64, 16):
        assert abs(rival.parameters / 2_000_000 - 1) < 0.05


def test_dynamic_int8_reaches_the_layers_of_gpt2() -> None:
    text = torch.randint(0, 64, (1, 12))
    gpt2 = rival_models.build(400_000, 64, 16)[0]
    linear = [m for m in gpt2.models["INT8"].modules() if "quantized" in type(m).__module__]
    assert len(linear) >= 4
    exact, coded = (gpt2.models[name](text).logits for name in ("float32", "INT8"))
    assert 0 < (exact - coded).abs().max() / exact.abs().max() < 0.2
    decode: Any = rival_models.decoder(gpt2.models["float32"], text[:, :11], text[:, 11:])
    for _ in range(2):  # the second call comes behind the same text as the first
        assert torch.allclose(decode().logits[0, 0], exact[0, 11], atol=1e-5)


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(InputError, match="the cases are layers, width 32, loops, serving, rivals"):
        inference.run_inference(QUIET, "nonsense")


def test_cases_can_be_named_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WIDTHS", settings.WIDTHS)
    with pytest.raises(InputError, match=f"the cases are {', '.join(settings.inference_cases())}$"):
        inference.run_inference(QUIET, "nonsense")


def test_small_models_need_not_be_faster_than_by_the_targets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "_PREFILL_WIDTH", 64)
    monkeypatch.setattr(inference, "_DECODE_WIDTH", 64)
    rows = {row.name: row.target for row in inference.at_width(32, 1)}
    del rows["prefill 32 float32 by oneDNN"]
    assert set(rows.values()) == {1.0}
