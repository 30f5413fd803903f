"""Compile every Triton kernel, as the Triton backend launches it, for a GPU that is not here.

Run as a script, without the interpreter. Prints a line for every variant. Nothing is computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton as triton_package
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bkcore.kernels.backends.interface import (
    Attention,
    AttentionBackward,
    Product,
    Sweep,
    SweepBackward,
    SweepCodes,
    SweepStep,
)
from bkcore.kernels.backends.triton import BACKEND, launch
from bkcore.kernels.backends.triton import attention as attention_host
from bkcore.kernels.backends.triton import codes as codes_host
from bkcore.kernels.backends.triton import sweep as sweep_host

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(
        self, *args: Any, num_warps: int = 4, enable_fp_fusion: bool = True, **constants: Any
    ) -> None:
        names = self.kernel.arg_names
        types = [TYPES[x.dtype] if isinstance(x, Tensor) else integer(x) for x in args]
        signature = dict.fromkeys(names, "constexpr") | dict(zip(names, types, strict=False))
        constants |= {
            name: 1 for name, x in zip(names, args, strict=False) if isinstance(x, int) and x == 1
        }
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, signature, constants)
        binary = triton_package.compile(source, target=TARGET, options=options)
        assert binary.asm["cubin"]
        print(self.kernel.__name__, types[0])


def integer(x: int) -> str:
    """The type that Triton gives a number: one that is 1 becomes a constant."""
    if x == 1:
        return "constexpr"
    return "i32" if x < 2**31 else "i64"


def kernels_of(name: str) -> SimpleNamespace:
    module = importlib.import_module(f"bkcore.kernels.backends.triton.{name}_kernels")
    functions = vars(module)
    return SimpleNamespace(
        **{
            name: Compiled(x)
            for name, x in functions.items()
            if isinstance(x, triton_package.JITFunction)
        }
    )


def sweeps(
    form: str, per_site: bool, dtype: torch.dtype, batch: int = 2, sites: int = 5000, lanes: int = 5
) -> None:
    v = torch.zeros(batch, sites, lanes, dtype=dtype)
    source, two_sided = v if form == "psi" else None, form == "two_sided"
    row = torch.zeros(lanes)
    eta, hopping = (
        torch.ones(sites if per_site else 1, lanes),
        row.expand(sites - 1 if per_site else 1, lanes),
    )
    chain = row, eta, hopping, two_sided
    parts = BACKEND.sweep(Sweep(v, source, *chain))
    kept = v if two_sided else None
    BACKEND.sweep_backward(SweepBackward(parts, parts, kept, source, *chain))


def codes(form: str, bits: int, levels: bool, lanes: int = 6) -> None:
    parts = 4 if form == "psi" else 2
    v = torch.zeros(1, 40, lanes, dtype=torch.int8)
    if bits == 4:
        v = torch.zeros(1, 40, (lanes + 1) // 2, dtype=torch.uint8)
    row = torch.ones(1, lanes)
    inputs, outputs = torch.ones(2, 1, lanes), torch.ones(parts, 1, lanes)
    table = torch.zeros(4, 2**bits) if levels else None
    source = v if form == "psi" else None
    quantizers: tuple[Any, ...] = (inputs, inputs, outputs, outputs, table, table)
    chain: tuple[Any, ...] = (row[0], row, row)
    given = [v, source, *chain, *quantizers, bits, form == "two_sided"]
    BACKEND.sweep_codes(SweepCodes(*given))


def attention(
    dtype: torch.dtype,
    batch: int = 2,
    sites: int = 70,
    heads: int = 3,
    keys: int = 32,
    values: int = 28,
) -> None:

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    site, row = zeros(batch, sites, heads), zeros(heads)
    query, value = zeros(batch, sites, heads, keys), zeros(batch, sites, heads, values)
    first = (zeros(batch, heads, 2), zeros(batch, heads, 2, keys, values))
    inputs = (site, site, row, row, query, query, value)
    g, out, psi, checkpoints = BACKEND.attention(Attention(*inputs, *first, keep=True))
    BACKEND.attention_backward(AttentionBackward(g, out, psi, *inputs, first[0], g, checkpoints))


def main() -> None:
    for part in (attention_host, codes_host, launch, sweep_host):
        part.kernels = kernels_of  # type: ignore[attr-defined]
    for form in ("g", "psi", "two_sided"):
        sweeps(form, False, torch.float32)
        sweeps(form, True, torch.float32)
        sweeps(form, False, torch.bfloat16)
        sweeps(form, False, torch.float32, 1, 1, 1)
        sweeps(form, False, torch.float32, 1, 40, 1)
    for bits in (4, 8):
        for levels in (False, True):
            codes("psi", bits, levels)
            codes("two_sided", bits, levels)
        codes("psi", bits, False, 1)
        weight = torch.zeros(8, 64 * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.zeros(8, 1, dtype=torch.bfloat16)
        BACKEND.product(Product(torch.zeros(3, 64), weight, scales, 64, bits))
        BACKEND.product(Product(torch.zeros(1, 1), weight[:1, :1], scales[:1], 1, bits))
    state, row = torch.zeros(2, 4, 5), torch.zeros(2, 5)
    BACKEND.sweep_step(SweepStep(state, row, row, row[0], row[0], row[0]))
    for dtype in (torch.float32, torch.float64):
        attention(dtype)
    attention(torch.float32, 1, 1, 1, 1, 1)


if __name__ == "__main__":
    main()
