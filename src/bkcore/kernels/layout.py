"""The memory layout of sweeps: one site after the other, or one sequence after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def computed_dtype(v: Tensor) -> torch.dtype:
    """The dtype in which a sweep of v computes, and of its result."""
    return torch.float32 if v.dtype == torch.bfloat16 else v.dtype


def sites_last(x: Tensor) -> bool:
    """True if x (B, N, ..., H) lies in memory as one sequence after the other: (B, H, N, ...)."""
    return x.shape[1] > 1 and x.shape[-1] > 1 and x.stride(-1) != 1 and x.stride(1) < x.stride(-1)


def empty_parts(v: Tensor, components: int) -> Tensor:
    """An empty tensor for the parts (B, N, C, H) of v (B, N, H), in v's memory order: contiguous,
    or (B, H, N, C) if v has its sites last, so that the parts of a site are complex numbers."""
    batch, sites, lanes = v.shape
    dtype = computed_dtype(v)
    if sites_last(v):
        return v.new_empty(batch, lanes, sites, components, dtype=dtype).permute(0, 2, 3, 1)
    return v.new_empty(batch, sites, components, lanes, dtype=dtype)


def empty_like_sites(parts: Tensor) -> Tensor:
    """An empty tensor (B, N, H) in the memory order of parts (B, N, C, H)."""
    batch, sites, _, lanes = parts.shape
    if sites_last(parts):
        return parts.new_empty(batch, lanes, sites).transpose(1, 2)
    return parts.new_empty(batch, sites, lanes)


def dense(x: Tensor) -> Tensor:
    """x itself if its lanes or its sites are contiguous in memory, else a contiguous copy."""
    return x if x.stride(2) == 1 or (sites_last(x) and x.stride(1) == 1) else x.contiguous()


def parameter_rows(x: Tensor) -> Tensor:
    """Make a row that all sites share contiguous, and copy rows that were expanded from one, so
    that a stride of 0 always means shared."""
    return x.contiguous() if x.shape[0] == 1 or x.stride(0) == 0 else x


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
