"""Calibrate in two processes; run by test_quantizing_calibration.py.

Usage: torchrun ... two_processes.py FOLDER.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from bkcore.errors import CalibrationError
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.processes import leave
from bkcore.quantization import QuantizationConfig

MODES = ("ptq_int4", "qat_int8")


def build(mode: str) -> ResNetBKForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "d_model": 16,
        "n_layers": 1,
        "num_experts": 3,
        "expert_size": 24,
    }
    model: Any = LanguageModel(**sizes)
    torch.nn.init.normal_(model.layers[0].mixer.out_proj.weight, std=0.2)
    model.configure_quantization(QuantizationConfig(mode, group_size=16, min_size=0))
    return model


def batches() -> list[Tensor]:
    """Of different lengths, so that the processes see different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, length), generator=generator) for length in (9, 30, 17, 24)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    for mode in MODES:
        model = build(mode)
        model.calibrate_quantization(batches()[rank::count])
        save_file(model.state_dict(), folder / f"{mode}-halves-{rank}")
    model = build(MODES[0])
    model.calibrate_quantization([] if rank else batches())
    save_file(model.state_dict(), folder / f"{MODES[0]}-first-{rank}")
    with pytest.raises(CalibrationError, match="saw no data"):
        build(MODES[0]).calibrate_quantization([])
    dist.barrier()  # a process that leaves early tears the connection down for the other
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
