"""Float checkpoints in half the bytes, and the curve of a training."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands.export import export_half
from bkcore.commands.files import prepare_model
from bkcore.commands.train import draw_curve
from bkcore.errors import CheckpointError, InputError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint


def test_a_model_in_float16_is_half_as_large_and_computes_in_float32(
    fox_checkpoint: Path, tmp_path: Path
) -> None:
    export_half(fox_checkpoint, tmp_path / "half")
    whole, tokenizer = load_checkpoint(fox_checkpoint)
    half, _ = load_checkpoint(tmp_path / "half")
    assert half.dtype == torch.float32
    for (name, x), y in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(x.half().float(), y), name
    sizes = [path.stat().st_size for path in tmp_path.glob("*/model.safetensors")]
    assert 0.45 < min(sizes) / max(sizes) < 0.6
    ids = torch.tensor([tokenizer("the fox sees")["input_ids"]])
    torch.testing.assert_close(half(ids).logits, whole(ids).logits, rtol=0, atol=0.02)


def test_what_cannot_be_exported_is_named(fox_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself"):
        export_half(fox_checkpoint, fox_checkpoint)
    export_half(fox_checkpoint, tmp_path / "half")
    with pytest.raises(InputError, match="half holds a float model, which would be lost"):
        export_half(fox_checkpoint, tmp_path / "half")
    model, tokenizer = load_checkpoint(fox_checkpoint)
    model.configure_quantization("ptq_int8")
    model.calibrate_quantization([torch.randint(len(tokenizer), (2, 20))])
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    with pytest.raises(InputError, match="is quantized"):
        export_half(tmp_path / "int8", tmp_path / "other")


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", '{"quantization": 2}', '{"quantization": "int8"}', "[" * 50_000]
)
def test_a_model_that_cannot_be_told_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="may hold a model"):
        prepare_model(tmp_path, tmp_path / "checkpoint")


def test_a_full_disk_leaves_no_half(fox_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("transformers.modeling_utils.safe_save_file", "bkcore.manifest.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(CheckpointError, match="No space left"):
                export_half(fox_checkpoint, tmp_path / "half")
        assert not (tmp_path / "half").exists()


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    curve = [{"step": 10 * n, "loss": 5.0 / n} for n in (1, 2, 3)]
    curve += [{"step": 30, "eval_loss": 2.0, "eval_ppl_token": 7.4, "eval_ppl_word": 40.0}]
    recipe = {"schedule": {"batch_size": 4}, "window": 16}
    draw_curve({"curve": curve, "recipe": recipe}, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_bytes().startswith(b"<?xml")


def test_the_command_names_a_model_that_it_replaces(fox_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(fox_checkpoint)
    model.configure_quantization("ptq_int8")
    model.calibrate_quantization([torch.randint(len(tokenizer), (2, 20))])
    save_checkpoint(tmp_path / "old", model, tokenizer)
    for folder, says_so in (("new", False), ("old", True)):
        command = ["export", str(fox_checkpoint), str(tmp_path / folder)]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        line = f"{tmp_path / folder} holds an earlier model, to be replaced when the new one is"
        assert (line in done.output) is says_so
