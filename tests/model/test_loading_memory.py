"""A quantized model takes the memory of its codes: while it is loaded, and after."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore.model import LanguageModel
from bkcore.quantization import QuantizationConfig

LOAD = """
import json, re, sys
from pathlib import Path
import torch
from bkcore.model import ResNetBKForCausalLM

def memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", status)[1])

def load(folder):
    model = ResNetBKForCausalLM.from_pretrained(folder)
    tensors = [*model.parameters(), *model.buffers()]
    for x in tensors:  # files are mapped: read a byte of every page, and copy nothing
        x.reshape(-1).view(torch.uint8)[::4096].sum()
    return model, tensors

small, large = sys.argv[1:]
load(small)  # what every load needs once
before = memory("VmRSS")
model, tensors = load(large)
sizes = {"bytes": sum(x.nbytes for x in tensors), "peak": memory("VmHWM") - before}
print(json.dumps(sizes))
"""


def save(folder: Path, mode: str, width: int, layers: int) -> int:
    """Bytes of the float32 model."""
    sizes: dict[str, Any] = {
        "d_model": width,
        "n_layers": layers,
        "num_experts": 4,
        "expert_size": 4 * width,
    }
    model = LanguageModel(512, **sizes).eval()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.configure_quantization(QuantizationConfig(mode, weight_rounding="nearest"))
    model.calibrate_quantization([torch.randint(512, (4, 64))])
    model.save_pretrained(folder)
    return size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, as Linux has it")
@pytest.mark.parametrize(
    ("mode", "share"),
    [pytest.param("ptq_int8", 0.26, marks=pytest.mark.slow), ("ptq_int4", 0.135)],
)
def test_loading_makes_no_float_copy(mode: str, share: float, tmp_path: Path) -> None:
    save(tmp_path / "small", mode, 32, 1)
    float_bytes = save(tmp_path / "large", mode, 256, 4)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = json.loads(result.stdout.splitlines()[-1])
    stored = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert stored <= share * float_bytes
    assert sizes["bytes"] <= stored
    # Beside the codes stand the modules as Python has them, about 4 MB. A float copy of one layer
    # in four would already pass this bound.
    assert sizes["peak"] <= stored + 0.15 * float_bytes
