"""Options of `bkcore quantize` that exclude each other, and folders that cannot be."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from bkcore.commands.quantize_steps import run_quantize
from bkcore.errors import CheckpointError, DataError, InputError
from bkcore.quantization.receipt_file import read
from tests.commands.quantizing import QUIET, settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "qat_int8"}, "--steps"),
        ({"mode": "ptq_int8", "steps": 3}, "takes no --steps"),
        ({"mode": "ptq_int8", "learning_rate": 1e-3}, "takes no --learning-rate"),
        ({"mode": "qat_int8", "steps": 3, "group_size": 64}, "and takes no --group-size"),
        ({"mode": "ptq_int4", "distill": False}, "takes no --distill and no --no-distill"),
        ({"mode": "ptq_int4", "target_bits": 5.0}, "mixes precisions"),
        ({"frontier": True}, "--frontier needs"),
        ({"mode": "mixed_precision", "target_bits": 5.0, "max_increase": 1.0}, "not both"),
        ({"mode": "mixed_precision", "max_increase": -3.0}, "must be positive, not -3 %"),
        ({"mode": "mixed_precision", "target_bits": math.nan}, "at most 16, not nan"),
        ({"mode": "mixed_precision", "target_bits": math.inf}, "at most 16, not inf"),
        ({"mode": "mixed_precision", "target_bits": -4.0}, "at most 16, not -4"),
        ({"mode": "int8"}, "unknown quantization mode"),
        ({"mode": "qat_int8", "steps": 3, "learning_rate": -1.0}, "learning_rate must be"),
    ],
)
def test_choices_that_exclude_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


def test_a_control_that_cannot_be(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not train"):
        run_quantize(checkpoint, tmp_path / "a", text, settings(), QUIET, tmp_path / "b")
    how = settings(mode="qat_int8", steps=1)
    for folder in (checkpoint, tmp_path / "a"):
        with pytest.raises(InputError, match="folder of its own"):
            run_quantize(checkpoint, tmp_path / "a", text, how, QUIET, folder)
    assert not (tmp_path / "a").exists()


def test_folders_that_cannot_be(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself"):
        run_quantize(checkpoint, checkpoint, text, settings(), QUIET)
    run_quantize(checkpoint, tmp_path / "int8", text, settings(), QUIET)
    run_quantize(checkpoint, tmp_path / "int8", text, settings(), QUIET)  # quickly made again
    with pytest.raises(InputError, match="is quantized"):
        run_quantize(tmp_path / "int8", tmp_path / "again", text, settings(), QUIET)
    with pytest.raises(DataError):
        run_quantize(checkpoint, tmp_path / "again", tmp_path / "nowhere", settings(), QUIET)
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="has no receipt"):
        read(checkpoint)


def test_no_float_model_is_lost(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    before = (other / "model.safetensors").read_bytes()
    how = settings(mode="qat_int8", steps=1)
    for output, control in ((other, None), (tmp_path / "new", other)):
        with pytest.raises(InputError, match="other holds a float model, which would be lost"):
            run_quantize(checkpoint, output, text, how, QUIET, control)
    (other / "config.json").write_text("{")
    with pytest.raises(InputError, match="other may hold a model, but its config"):
        run_quantize(checkpoint, other, text, how, QUIET)
    assert (other / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()
