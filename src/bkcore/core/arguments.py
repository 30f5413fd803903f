"""Checks of the public functions' arguments: types, and the range that the functions compute in.

Numbers may be Python's, NumPy's or tensors. Tensors are never converted to numbers, so that
gradients reach them. Values are checked where that takes only microseconds and some percent of the
sweep: numbers always, and tensors on the CPU outside tracing and `vmap`. On a GPU a check would
synchronize with the device at every call, so it is left out.

Range
-----
The continued fractions square the denominators d = a - z - t^2 g, and these squares must not
overflow or underflow. `|g| <= 1/eta` and `|Im d| >= eta` bound |d| by the arguments alone: between
eta and `|v| + |onsite| + |Re z| + eta + 2 t^2 / eta`. So with M = 1e18 in float32 and 1e150 in
float64, everything is as accurate as round-off allows for

    1/M <= eta <= M,    |v|, |onsite|, |Re z| <= M,    t^2 <= M eta.

Anything else is refused, except NaN, which propagates to the result.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import SupportsFloat, cast

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.checks import not_positive

_LARGEST = {torch.float32: 1e18, torch.float64: 1e150}
"""M for each dtype of the computation."""


def computing_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def require_tensor(name: str, value: object) -> None:
    """Raise `DTypeError` unless this is a tensor."""
    if not isinstance(value, Tensor):
        raise DTypeError(
            f"{name} must be a torch.Tensor, not {type(value).__name__}; use torch.as_tensor()"
        )


def require_real_float(name: str, value: Tensor) -> None:
    """Raise `DTypeError` unless this is a real floating-point tensor."""
    require_tensor(name, value)
    if value.is_complex():
        raise DTypeError(f"{name} must be real, not {value.dtype}; use .real")
    if not value.is_floating_point():
        raise DTypeError(f"{name} must be a floating-point tensor, not {value.dtype}; use .float()")


def require_complex(name: str, value: Tensor) -> None:
    """Raise `DTypeError` unless this is a complex tensor."""
    require_tensor(name, value)
    if not value.is_complex():
        raise DTypeError(f"{name} must be complex, not {value.dtype}; use torch.complex()")


def require_bool(name: str, value: bool) -> None:
    """Raise `DTypeError` unless this is True or False."""
    if not isinstance(value, bool):
        raise DTypeError(f"{name} must be True or False, not {type(value).__name__}")


def real(
    name: str, value: object, like: Tensor | None = None, like_name: str = "v"
) -> float | Tensor:
    """A real number as a float, or a real tensor unchanged.

    Args:
        name: of the argument, for error messages.
        value: the argument.
        like: a tensor on whose device it must be; a tensor without dimensions may be on any.
        like_name: its name.

    Raises:
        DTypeError: for anything else.
        InputError: for a number outside float64, or a tensor on another device.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise DTypeError(f"{name} must be real, not {value.dtype}")
        if like is not None:
            require_device(name, value, like, like_name)
        return value
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        got = value if isinstance(value, numbers.Complex) else type(value).__name__
        raise DTypeError(f"{name} must be real, a number or a tensor, not {got}")
    return _in_float64(name, cast(SupportsFloat, value))


def real_number(name: str, value: object) -> float:
    """A real number, or a real tensor with one element and no gradient, as a float.

    Raises:
        DTypeError, InputError: as in `real`, and for any other tensor.
    """
    value = real(name, value)
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.requires_grad or not _is_readable(value):
        raise InputError(
            f"{name} must be a number, not a tensor of shape {tuple(value.shape)}"
            f"{', which requires a gradient' if value.requires_grad else ''} on {value.device}"
        )
    return float(value.item())


def split_z(z: object, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Real and imaginary parts of z, a complex number or tensor."""
    if isinstance(z, Tensor):
        if not z.is_complex():
            raise InputError(f"z must be complex with Im z > 0, not a real tensor ({z.dtype})")
        require_device("z", z, like)
        return z.real, z.imag
    if isinstance(z, bool) or not isinstance(z, numbers.Complex):
        raise DTypeError(f"z must be a complex number or tensor, not {type(z).__name__}")
    return _in_float64("z", z.real), _in_float64("z", z.imag)


def require_device(name: str, value: Tensor, like: Tensor, like_name: str = "v") -> None:
    """Raise `InputError` unless a tensor is on the device of `like` or has no dimensions."""
    if value.device != like.device and (value.ndim or value.is_meta):
        raise InputError(
            f"{name} is on {value.device} but {like_name} on {like.device}; move one of them"
        )


def require_positive(name: str, value: float | Tensor) -> None:
    """Raise `InputError` if a number, or any checked element of a tensor, is not positive."""
    smallest = _extremes(value)[0]
    if not smallest > 0:
        raise not_positive(name, smallest)


def require_range(
    dtype: torch.dtype,
    added: Mapping[str, float | Tensor],
    eta: float | Tensor,
    hopping: float | Tensor,
    *,
    eta_name: str = "Im z",
    tensor: str = "v",
) -> None:
    """Raise `InputError` unless eta is positive and the arguments are in this module's range.

    Args:
        dtype: of the computation.
        added: the terms of the diagonal, by name.
        eta, hopping: numbers, or tensors that broadcast against each other except for a last
            dimension of sites or bonds.
        eta_name: the name of eta.
        tensor: the argument whose dtype determines that of the computation.
    """
    require_positive(eta_name, eta)
    largest = _LARGEST[dtype]
    remedy = f"in {str(dtype).removeprefix('torch.')}; " + (
        f"give {tensor} in float64, or choose other units of energy"
        if dtype == torch.float32
        else "choose other units of energy"
    )
    smallest, high = _extremes(eta)
    if smallest < 1 / largest:
        raise InputError(
            f"{eta_name} goes down to {smallest:.3g}, but must be at least {1 / largest:.0e} "
            f"{remedy}"
        )
    for name, x in {eta_name: max(high, 0.0), **added}.items():
        if not _is_within(x, largest) and (found := largest_modulus(x)) > largest:
            raise InputError(
                f"{name} reaches {found:.3g}, but must not exceed {largest:.0e} {remedy}"
            )
    found = _largest_ratio(hopping, eta)
    if found > math.sqrt(largest):
        raise InputError(
            f"hopping / sqrt({eta_name}) reaches {found:.3g}, but must not exceed "
            f"{math.sqrt(largest):.0e} {remedy}"
        )


def require_broadcast(**arguments: float | Tensor) -> None:
    """Raise unless all tensors broadcast against each other and are on one device."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ShapeError(f"the shapes do not broadcast: {_listed(shapes)}") from None
    devices = {name: x.device for name, x in tensors.items() if x.ndim or x.is_meta}
    if len(set(devices.values())) > 1:
        raise InputError(f"tensors are on different devices: {_listed(devices)}")


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {x}" for name, x in found.items())


def require_fits(name: str, value: Tensor, v: Tensor) -> None:
    """Raise unless a real or complex tensor (..., N) broadcasts against v, or a result of v."""
    require_tensor(name, value)
    if value.dtype == torch.bool:
        raise DTypeError(f"{name} must be real or complex, not {value.dtype}")
    sites = v.shape[-1]
    if value.ndim == 0 or value.shape[-1] != sites:
        raise ShapeError(
            f"{name} must have {sites} sites in its last dimension, not {tuple(value.shape)}"
        )
    broadcast_leading({name: value, "v": v})
    require_device(name, value, v)


def require_alike(v: Tensor, v_perturbed: Tensor) -> None:
    """Raise unless these are real potentials of equally many sites, on one device."""
    require_real_float("v", v)
    require_real_float("v_perturbed", v_perturbed)
    broadcast_leading({"v": v, "v_perturbed": v_perturbed})
    if v.shape[-1:] != v_perturbed.shape[-1:] or v.device != v_perturbed.device:
        raise ShapeError(
            "v and v_perturbed must have equally many sites and be on one device, not "
            f"{tuple(v.shape)} on {v.device} and {tuple(v_perturbed.shape)} on {v_perturbed.device}"
        )


def broadcast_leading(arguments: dict[str, float | Tensor]) -> torch.Size:
    """The common shape of all dimensions except the last; `ShapeError` if there is none."""
    shapes = {k: x.shape[:-1] for k, x in arguments.items() if isinstance(x, Tensor)}
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = _listed({name: tuple(shape) for name, shape in shapes.items()})
        raise ShapeError(f"leading dimensions do not broadcast: {listed}") from None


def _in_float64(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name} is too large for float64") from None


def _is_readable(value: Tensor) -> bool:
    """Whether checking the values costs almost nothing."""
    plain = type(value) in (Tensor, torch.nn.Parameter)
    on_cpu = value.device.type == "cpu" and value.numel() > 0
    if not plain or not on_cpu or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _extremes(x: float | Tensor) -> tuple[float, float]:
    """Smallest and largest number that is not NaN; (inf, -inf) for a tensor that is not checked."""
    if not isinstance(x, Tensor):
        return x, x
    if not _is_readable(x):
        return math.inf, -math.inf
    low, high = torch.aminmax(x.detach())
    if math.isnan(found := low.item()):  # a single NaN hides everything else
        x = x.detach()
        return x.nan_to_num(torch.inf).min().item(), x.nan_to_num(-torch.inf).max().item()
    return found, high.item()


def largest_modulus(x: float | Tensor) -> float:
    """The largest modulus that is not NaN; 0 for a tensor that is not checked."""
    low, high = _extremes(x)
    return max(-low, high, 0.0)


def _is_within(x: float | Tensor, largest: float) -> bool:
    """Whether the norm, the fastest check, shows that no modulus is above `largest`."""
    if not isinstance(x, Tensor):
        return abs(x) <= largest
    if not x.is_floating_point() or not _is_readable(x):
        return False
    return torch.linalg.vector_norm(x.detach()).item() <= largest


def _largest_ratio(hopping: float | Tensor, eta: float | Tensor) -> float:
    """The largest |t| / sqrt(eta) of any chain, with the smallest eta of its sites."""
    if not isinstance(hopping, Tensor) or not isinstance(eta, Tensor):
        return largest_modulus(hopping) / math.sqrt(_extremes(eta)[0])
    if not (_is_readable(hopping) and _is_readable(eta)):
        return 0.0
    t, width = hopping.detach(), eta.detach()
    t = t.abs().amax(-1, keepdim=True) if t.ndim else t.abs()
    width = width.amin(-1, keepdim=True) if width.ndim else width
    ratio = t.double() / width.double().sqrt()
    return float(ratio.nan_to_num(0.0, torch.inf).max().item())
