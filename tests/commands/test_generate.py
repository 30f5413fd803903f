"""`bkcore generate` by the engine: the text of the model, at once, and otherwise by PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from bkcore.cli import app
from bkcore.commands import generate
from bkcore.commands.generate import continue_text, sample
from bkcore.errors import CheckpointError, InputError
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.model import LanguageModel
from bkcore_runtime import load
from tests.model.helpers import edit, sign

PROMPT = "the slow fox"


def by_pytorch(folder: Path, temperature: float = 0.0) -> str:
    return sample(*load_checkpoint(folder), PROMPT, 30, temperature)


def run(folder: Path) -> Result:
    """The whole command."""
    options = ("--prompt", PROMPT, "--tokens", "30", "--temperature", "0")
    done = CliRunner().invoke(app, ["generate", str(folder), *options])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def lively(fox_checkpoint: Path) -> Path:
    """A checkpoint whose text depends on what came before."""
    model, _ = load_checkpoint(fox_checkpoint)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down.weight")):
            torch.nn.init.normal_(parameter, std=20)
    model.save_pretrained(fox_checkpoint)
    return fox_checkpoint


@pytest.fixture
def no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("PyTorch was asked")

    monkeypatch.setattr(generate, "continue_with_pytorch", refuse)


def test_the_greedy_text_is_that_of_transformers(lively: Path, no_pytorch: None) -> None:
    text = by_pytorch(lively)
    assert continue_text(lively, PROMPT, 30, 0.0, 0) == text
    done = run(lively)
    assert (done.stdout, done.stderr) == (text + "\n", "")
    assert len(set(text.removeprefix(PROMPT))) > 5


def test_a_seed_gives_the_same_text(lively: Path, no_pytorch: None) -> None:
    texts = [continue_text(lively, PROMPT, 30, 1.0, seed) for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"repetition_penalty": 2.0, "top_k": 1}],
)
def test_filters_of_the_checkpoint_are_followed(
    lively: Path, no_pytorch: None, fields: dict[str, Any]
) -> None:
    """With these one token is left, so that both ways must draw it."""
    edit(lively, "generation_config.json", **fields)
    assert continue_text(lively, PROMPT, 30, 1.0, 0) == by_pytorch(lively, 1.0)


@pytest.mark.parametrize("fields", [{"top_k": "5"}, {"top_k": True}, {"top_k": 2.5}, {"top_p": []}])
def test_filters_that_cannot_be_are_the_fault_of_the_checkpoint(
    lively: Path, fields: dict[str, Any]
) -> None:
    edit(lively, "generation_config.json", **fields)
    (name,) = fields
    with pytest.raises(CheckpointError, match=rf"{name} in .*generation_config\.json cannot be"):
        continue_text(lively, PROMPT, 5, 1.0, 0)


def test_the_environment_says_how_many_threads_a_large_model_gets(
    lively: Path, no_pytorch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bkcore_runtime import engine

    threads: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(engine, "_SMALL", 0)
    made = engine.Engine.generate

    def watched(self: engine.Engine, *arguments: Any, **options: Any) -> Any:
        threads.append(self.threads)
        return made(self, *arguments, **options)

    monkeypatch.setattr(engine.Engine, "generate", watched)
    continue_text(lively, PROMPT, 5, 0.0, 0)
    assert threads == [3]


def test_a_text_ends_where_the_checkpoint_says(lively: Path, no_pytorch: None) -> None:
    whole = by_pytorch(lively)
    engine, tokenizer = load(lively)
    sixth = list(engine.generate(tokenizer.encode(PROMPT), 6))[5]
    edit(lively, "generation_config.json", eos_token_id=[sixth])
    text = continue_text(lively, PROMPT, 30, 0.0, 0)
    assert text == by_pytorch(lively)
    assert len(text) < len(whole)


@pytest.mark.parametrize(
    ("file", "fields", "why"),
    [
        ("generation_config.json", {"num_beams": 2}, "does not follow num_beams"),
        ("generation_config.json", {"bad_words_ids": [[5]]}, "does not follow bad_words_ids"),
        ("tokenizer_config.json", {"add_bos_token": True}, "transformers would change it"),
    ],
)
def test_what_the_engine_does_not_do_is_said_and_done(
    lively: Path, file: str, fields: dict[str, Any], why: str
) -> None:
    edit(lively, file, **fields)
    done = run(lively)
    assert done.stdout == by_pytorch(lively) + "\n"
    (line,) = done.stderr.splitlines()
    assert why in line
    assert line.endswith("; computing with PyTorch")


def test_another_mixer_is_run_by_pytorch(tmp_path: Path, lively: Path) -> None:
    _, tokenizer = load_checkpoint(lively)
    model = LanguageModel(len(tokenizer), 32, 1, 48, num_experts=2, mixer="convolution")
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    done = run(tmp_path / "other")
    assert done.stdout == by_pytorch(tmp_path / "other") + "\n"
    assert "the mixer is not resolvent" in done.stderr


def test_a_damaged_checkpoint_is_refused_once(
    lively: Path, no_pytorch: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (lively / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="was truncated or altered"):
        continue_text(lively, PROMPT, 5, 0.0, 0)
    (lively / "generation_config.json").write_text("[]")
    sign(lively)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        continue_text(lively, PROMPT, 5, 0.0, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prompt", ["", "\udcff"])
def test_prompts_that_cannot_be(lively: Path, prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt"):
        continue_text(lively, prompt, 5, 0.0, 0)


def test_nothing_heavy_is_imported(lively: Path) -> None:
    code = f"""if True:
        import sys
        from pathlib import Path
        from bkcore.commands.generate import continue_text, generate
        assert continue_text(Path({str(lively)!r}), "the", 3, 0.8, 0)
        sys.exit(str({{"torch", "transformers", "safetensors"}} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"
