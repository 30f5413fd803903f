"""Float checkpoints in half the bytes, and the curve of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bkcore.errors import InputError
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.report.curve import draw_curve
from bkcore.report.export import export_half


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


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    curve = [{"step": 10 * n, "loss": 5.0 / n} for n in (1, 2, 3)]
    curve += [{"step": 30, "eval_loss": 2.0, "eval_ppl_token": 7.4, "eval_ppl_word": 40.0}]
    recipe = {"schedule": {"batch_size": 4}, "window": 16}
    draw_curve({"curve": curve, "recipe": recipe}, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_bytes().startswith(b"<?xml")
