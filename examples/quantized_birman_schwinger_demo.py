"""Quantize a Birman-Schwinger core in every mode and show error and size.

Run:  python examples/quantized_birman_schwinger_demo.py

The core maps N potentials v to the diagonal of (H - z)^-1, where H is the discrete Laplacian plus
diag(v). Calibration and test potentials are drawn separately. Errors are mean |error| over mean
|value|.
"""

import torch
from rich.console import Console
from rich.table import Table

from bkcore import (
    BirmanSchwingerCore,
    QuantizedBirmanSchwingerCore,
    create_quantized_birman_schwinger,
)

N_SEQ = 512
MODES = ("ptq_int8", "qat_int8", "ptq_int4", "qat_int4")


def potentials(batches: int, seed: int) -> list[torch.Tensor]:
    """Batches of standard normal potentials, (8, N_SEQ) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, N_SEQ, generator=generator) for _ in range(batches)]


def train_step_sizes(model: QuantizedBirmanSchwingerCore, batches: list[torch.Tensor]) -> None:
    """QAT of a bare core: its only parameters are the step sizes of its quantizers."""
    exact = BirmanSchwingerCore(N_SEQ)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for v in batches:
        loss = (model(v) - exact(v)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Print a table with a line for each mode."""
    table = Table("mode", "bits", "Re G error", "Im G error", "SNR", "smaller", "state")
    for mode in MODES:
        model = create_quantized_birman_schwinger(n_seq=N_SEQ, mode=mode, group_size=128)
        model.start_calibration()
        for v in potentials(10, seed=0):
            model(v)
        model.end_calibration()
        if mode.startswith("qat"):
            model.enable_qat()
            train_step_sizes(model, potentials(50, seed=1))
            model.convert()
        else:
            model.apply_ptq()
        model.eval()
        _, found = model(potentials(1, seed=2)[0], return_diagnostics=True)
        real, imag = found["G_real_quantization_error"], found["G_imag_quantization_error"]
        table.add_row(
            mode,
            str(found["bits"]),
            f"{real['relative_error_percent']:.2f} %",
            f"{imag['relative_error_percent']:.2f} %",
            f"{real['snr_db']:.1f} dB",
            f"{model.estimate_model_size()['compression_ratio']:.2f}x",
            found["state"],
        )
    Console().print(table)


if __name__ == "__main__":
    main()
