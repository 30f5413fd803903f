"""Reading on with a quantized model, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bkcore.bench import stability
from bkcore.errors import InputError
from bkcore.model import LanguageModel
from bkcore.text import train_tokenizer

QUIET = Console(quiet=True)
WORDS = " ".join(f"the {n} rivers rise in {n * n} mountains\n" for n in range(3000))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text(WORDS)
    (folder / "text" / "valid.txt").write_text(WORDS[:60_000])
    tokenizer = train_tokenizer(WORDS, 300)
    model = LanguageModel(300, d_model=32, n_layers=2, num_experts=2, expert_size=32).eval()
    for layer in model.layers:
        torch.nn.init.normal_(layer.mixer.out_proj.weight, std=0.2)
    model.save_pretrained(folder / "float")
    model.configure_quantization("ptq_int8")
    model.calibrate_quantization([torch.randint(300, (4, 128))])
    model.save_pretrained(folder / "int8")
    for name in ("float", "int8"):
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("float", "int8", "text")}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "_PROBE", 64)
    monkeypatch.setattr(stability, "_CERTIFIED", 32)


def run(folders: dict[str, Path], length: int = 2_500, step: int = 300) -> list[stability.Age]:
    return measure(folders, length, step).ages


def measure(folders: dict[str, Path], length: int, step: int) -> stability.Stability:
    return stability.run_stability(
        QUIET, folders["int8"], folders["float"], folders["text"], length, step
    )


def test_every_age_has_its_figures(folders: dict[str, Path]) -> None:
    result = measure(folders, 2_500, 300)
    ages = result.ages
    assert result.protocol["probe_tokens"] == 64
    assert result.protocol["text_tokens"] > 1_000
    assert [age.position for age in ages] == [1_000, 2_500]
    for age in ages:
        assert 0 < age.standard_error < age.kl < 0.1
        assert len(age.worst) == 2
        assert all(0 < ratio <= 1 for ratio in age.worst)
        assert age.resident_bytes > 1e8
    assert "2,500" in str(stability.table(ages).columns[0]._cells)
    json.dumps(stability.report(result))


def test_the_step_changes_nothing(folders: dict[str, Path]) -> None:
    whole, apart = (run(folders, 1_000, step)[0] for step in (1_000, 7))
    assert whole.worst == apart.worst
    # The float reference rounds differently, at 1e-6 of its logits.
    assert abs(whole.kl - apart.kl) < 1e-3 * whole.kl


def test_a_model_that_loses_its_way_is_seen(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = stability._read

    def drifting(model, piece, state):
        after = true(model, piece, state)
        if model.config.quantization is not None and int(after.seen) > 1_000:
            for layer in after.layers:
                layer.psi.mul_(30)
        return after

    monkeypatch.setattr(stability, "_read", drifting)
    young, old = run(folders)
    assert old.kl > 3 * young.kl


def test_divergence_is_that_of_pytorch() -> None:
    p, q = torch.randn(50, 20), torch.randn(50, 20)
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    mean, error = stability.divergence(p, q)
    assert mean == pytest.approx(float(expected.mean()))
    assert error == pytest.approx(float(expected.std()) / 50**0.5)
    assert stability.divergence(p, p)[0] == 0


def test_models_that_do_not_belong_together_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="is float, not quantized; quantize it with bkcore quantize"
    ):
        run({**folders, "int8": folders["float"]})
    with pytest.raises(InputError, match="is not a float model"):
        run({**folders, "float": folders["int8"]})
    other = LanguageModel(280, d_model=32, n_layers=1, num_experts=2, expert_size=32)
    other.save_pretrained(tmp_path)
    train_tokenizer(WORDS, 280).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="different tokenizers"):
        run({**folders, "float": tmp_path})
    monkeypatch.setattr(stability, "_PROBE", 10**6)
    with pytest.raises(InputError, match="tokens, but the probe takes 1000000"):
        run(folders)
