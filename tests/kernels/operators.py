"""Arguments of every operator and of every other function that hands tensors to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bkcore import kernels
from bkcore.kernels.backends.interface import ATTENTION_CHUNK

Arguments = dict[str, Any]


def groups(size: int, group_size: int) -> int:
    return -(-size // max(1, min(group_size, size)))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def codes(*shape: int, bits: int = 8) -> Tensor:
    if bits == 8:
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    *lead, last = shape
    return torch.randint(0, 256, (*lead, -(-last // 2)), dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return (0.05 + torch.rand(shape)).bfloat16()


def ascending(*lead: int, bits: int) -> Tensor:
    return (0.5 + torch.rand(*lead, 2**bits)).cumsum(-1) - 2 ** (bits - 1)


def sweep(batch: int = 2, sites: int = 5, lanes: int = 3, two_sided: bool = False) -> Arguments:
    return {
        "v": normal(batch, sites, lanes),
        "source": None if two_sided else normal(batch, sites, lanes),
        "energy": normal(lanes),
        "eta": 0.3 + torch.rand(1, lanes),
        "hopping": normal(1, lanes),
        "two_sided": two_sided,
    }


def sweep_backward(two_sided: bool = False, **sizes: int) -> Arguments:
    args = sweep(**sizes, two_sided=two_sided)
    parts = torch.ops.bkcore.sweep.default(**args)
    return {"grad": torch.randn_like(parts), "parts": parts, **args}


def sweep_codes(
    batch: int = 2, sites: int = 5, lanes: int = 3, bits: int = 8, two_sided: bool = False
) -> Arguments:
    inputs = 1 if two_sided else 2
    args = sweep(batch, sites, lanes, two_sided)
    return {
        **args,
        "v": codes(batch, sites, lanes, bits=bits),
        "source": None if two_sided else codes(batch, sites, lanes, bits=bits),
        "in_scale": scales(inputs, 1, lanes).float(),
        "in_zero": codes(inputs, 1, lanes),
        "out_scale": scales(2 * inputs, 1, lanes).float(),
        "out_zero": codes(2 * inputs, 1, lanes),
        "in_levels": ascending(inputs, bits=bits),
        "out_levels": ascending(2 * inputs, bits=bits),
        "bits": bits,
    }


def sweep_rounded(
    batch: int = 2, sites: int = 5, lanes: int = 3, bits: int = 4, group_size: int = 2
) -> Arguments:
    args = sweep(batch, sites, lanes)
    del args["source"]
    shape = (3, groups(sites, group_size))
    return {
        **args,
        "scale": scales(*shape).float(),
        "zero": torch.zeros(shape),
        "levels": ascending(3, bits=bits),
        "group_size": group_size,
        "bits": bits,
    }


def product(
    rows: int = 3, inputs: int = 5, outputs: int = 4, bits: int = 4, group_size: int = 2
) -> Arguments:
    return {
        "x": normal(rows, inputs),
        "weight": codes(outputs, inputs, bits=bits),
        "scales": scales(outputs, groups(inputs, group_size)),
        "group_size": group_size,
        "bits": bits,
    }


def silu(rows: int = 3, channels: int = 5) -> Arguments:
    return {"x": normal(rows, channels)}


def rms_norm(rows: int = 3, channels: int = 5) -> Arguments:
    return {"x": normal(rows, channels), "weight": normal(channels), "eps": 1e-6}


def unit_length(rows: int = 3, channels: int = 5) -> Arguments:
    return {"x": normal(rows, channels), "eps": 1e-6}


def softmax(rows: int = 3, channels: int = 5) -> Arguments:
    return {"x": normal(rows, channels)}


def short_convolution(
    batch: int = 2, sites: int = 4, taps: int = 3, channels: int = 5
) -> Arguments:
    return {
        "x": normal(batch, max(0, sites + taps - 1), channels),
        "weight": normal(taps, channels),
    }


def dense_product(rows: int = 3, inputs: int = 5, outputs: int = 4) -> Arguments:
    return {"x": normal(rows, inputs), "weight": normal(outputs, inputs)}


def round_rows(rows: int = 3, inputs: int = 5) -> Arguments:
    return {"x": normal(rows, inputs)}


def round_channels(
    rows: int = 3, channels: int = 5, bits: int = 4, group_size: int = 2
) -> Arguments:
    size = groups(channels, group_size)
    return {
        "x": normal(rows, channels),
        "scale": scales(size),
        "zero": torch.zeros(size, dtype=torch.int8),
        "levels": ascending(bits=bits),
        "group_size": group_size,
        "bits": bits,
    }


def round_channels_backward(**sizes: int) -> Arguments:
    args = round_channels(**sizes)
    return {"grad": torch.randn_like(args["x"]), **args}


def round_channels_straight_through(**sizes: int) -> Arguments:
    args = round_channels(**sizes)
    return {**args, "scale": args["scale"].float()}


def round_weight(rows: int = 3, columns: int = 5, bits: int = 4, group_size: int = 2) -> Arguments:
    return {
        "weight": normal(rows, columns),
        "scale": scales(rows, groups(columns, group_size)).float(),
        "group_size": group_size,
        "bits": bits,
    }


def round_weight_backward(**sizes: int) -> Arguments:
    args = round_weight(**sizes)
    return {"grad": torch.randn_like(args["weight"]), **args}


def attention(
    batch: int = 2, sites: int = ATTENTION_CHUNK + 1, heads: int = 3, keys: int = 4, values: int = 5
) -> Arguments:
    hopping = torch.rand(batch, sites, heads)
    return {
        "v": 1 + hopping**2 + 0.3 * normal(batch, sites, heads),
        "hopping": hopping,
        "energy": 0.1 * normal(heads),
        "eta": 0.3 + torch.rand(heads),
        "query": normal(batch, sites, heads, keys),
        "key": normal(batch, sites, heads, keys),
        "value": normal(batch, sites, heads, values),
        "first_g": torch.rand(batch, heads, 2),
        "first_psi": normal(batch, heads, 2, keys, values),
        "keep": True,
    }


def attention_backward(**sizes: int) -> Arguments:
    args = attention(**sizes)
    g, out, psi, checkpoints = torch.ops.bkcore.attention.default(**args)
    del args["first_psi"], args["keep"]
    grads = {"dg": g, "dout": out, "dpsi": psi}
    return {
        **{name: torch.randn_like(x) for name, x in grads.items()},
        **args,
        "g": g,
        "checkpoints": checkpoints,
    }


def attention_function(**sizes: int) -> Arguments:
    args = attention(**sizes)
    del args["keep"]
    return args


def sweep_step(batch: int = 2, lanes: int = 3) -> Arguments:
    return {
        "state": normal(batch, 4, lanes),
        "v": normal(batch, lanes),
        "source": normal(batch, lanes),
        "energy": normal(lanes),
        "eta": 0.3 + torch.rand(lanes),
        "hopping": normal(lanes),
    }


OPERATORS: dict[str, Callable[..., Arguments]] = {
    "sweep": sweep,
    "sweep_backward": sweep_backward,
    "sweep_codes": sweep_codes,
    "sweep_rounded": sweep_rounded,
    "product": product,
    "silu": silu,
    "rms_norm": rms_norm,
    "unit_length": unit_length,
    "short_convolution": short_convolution,
    "dense_product": dense_product,
    "softmax": softmax,
    "round_rows": round_rows,
    "round_channels": round_channels,
    "round_channels_backward": round_channels_backward,
    "round_weight": round_weight,
    "round_weight_backward": round_weight_backward,
    "attention": attention,
    "attention_backward": attention_backward,
}
"""Of `torch.ops.bkcore`."""

FUNCTIONS: dict[str, Callable[..., Arguments]] = {
    "sweep_step": sweep_step,
    "round_channels_straight_through": round_channels_straight_through,
    "attention": attention_function,
    **{
        name: OPERATORS[name]
        for name in (
            "sweep",
            "sweep_codes",
            "sweep_rounded",
            "product",
            "silu",
            "rms_norm",
            "unit_length",
            "short_convolution",
            "dense_product",
            "softmax",
            "round_rows",
            "round_channels",
            "round_weight",
        )
    },
}
"""Of `bkcore.kernels`."""

DIFFERENTIABLE = {
    "sweep": "sweep",
    "attention": "attention",
    "round_channels_straight_through": "round_channels",
    "round_weight": "round_weight",
}
"""Functions with a derivative, and the operators that they call."""

EVERY = [*(f"torch.ops.{name}" for name in OPERATORS), *FUNCTIONS]


def arguments(name: str, **sizes: Any) -> Arguments:
    """Fresh arguments of one of `EVERY`, all optional tensors among them."""
    torch.manual_seed(0)
    if name.startswith("torch.ops."):
        return OPERATORS[name.removeprefix("torch.ops.")](**sizes)
    return FUNCTIONS[name](**sizes)


def call(name: str, args: Arguments) -> tuple[Tensor, ...]:
    """The results of one of `EVERY`."""
    if name.startswith("torch.ops."):
        function = getattr(torch.ops.bkcore, name.removeprefix("torch.ops.")).default
    else:
        function = getattr(kernels, name)
    with torch.no_grad():
        results = function(**args)
    return results if isinstance(results, tuple) else (results,)


def tensors(args: Arguments) -> list[str]:
    return [name for name, x in args.items() if isinstance(x, Tensor)]
