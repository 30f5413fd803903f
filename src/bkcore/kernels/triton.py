"""The sweep on a GPU, in Triton: the host's side of `bkcore.kernels.triton_sweep`.

Triton is imported when the backend is used for the first time. On CPU tensors the kernels run only
in Triton's interpreter (TRITON_INTERPRET=1 in the environment), which is for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from bkcore.kernels import reference, weight_levels
from bkcore.kernels.backend import (
    ATTENTION_CHUNK,
    Backend,
    Gradients,
    empty_like_sites,
    empty_parts,
    ordered_sum,
)

_BLOCK = 32
"""Lanes of a program, one warp."""

_CHAIN_BLOCKS = 1 << 18
"""Blocks of chains that fill a large GPU: 132 multiprocessors of up to 2,048 threads each."""

_SHORTEST, _LONGEST = 32, 1024
"""Sites of a block. A block's matrix is as large as 16 or 36 of its potentials."""

_GROUP = 64
"""Blocks whose matrices one thread walks through; more of them are grouped first."""

_ROWS, _OUTPUTS, _INPUTS = 16, 64, 64
"""Tile of a product in codes."""


def absent() -> str | None:
    """Why Triton cannot be used here, with what to do about it; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'bkcore[gpu]'"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU: move to a machine with one, or choose 'cpu' or 'reference'"
    return None


def refuses(v: Tensor) -> str | None:
    if v.device.type != "cuda" and not (v.device.type == "cpu" and _interpreted()):
        return f"it takes CUDA tensors, not {v.device.type}: move them, or choose 'reference'"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    return importlib.import_module("bkcore.kernels.triton_sweep")


def block_length(batch: int, sites: int, lanes: int, dtype: torch.dtype) -> int:
    """Sites of a block: as many as leave enough blocks to fill a GPU. All, if there are chains
    enough, or in float64, where nothing wider is left to find what enters a block."""
    chains = max(batch * lanes, 1)
    if dtype == torch.float64 or chains >= _CHAIN_BLOCKS:
        return max(sites, 1)
    wanted = chains * sites // _CHAIN_BLOCKS
    return min(max(1 << max(wanted - 1, 0).bit_length(), _SHORTEST), _LONGEST)


class _Launch:
    """Grid and constants that the kernels of one sweep share."""

    def __init__(self, batch: int, sites: int, lanes: int, dtype: torch.dtype, device: Any) -> None:
        self.batch, self.sites, self.lanes, self.device = batch, sites, lanes, device
        self.length = block_length(batch, sites, lanes, dtype)
        self.blocks = -(-sites // self.length)
        self.started = self.blocks > 1
        self.sizes = (sites, lanes, self.blocks)

    def run(self, kernel: Any, *args: Any, blocks: int | None = None, **constants: Any) -> None:
        """Run a kernel for every block (of sites, or as many as given), tile of lanes and batch
        element."""
        blocks = self.blocks if blocks is None else blocks
        programs = blocks * -(-self.lanes // _BLOCK) * self.batch
        if programs == 0:
            return
        # Products and sums are rounded one by one, as on a CPU without fused operations.
        with _on(self.device):
            kernel[(programs,)](
                *args, **constants, BLOCK=_BLOCK, num_warps=1, enable_fp_fusion=False
            )

    def maps(self, dim: int, blocks: int | None = None) -> Tensor:
        blocks = self.blocks if blocks is None else blocks
        shape = (self.batch, blocks, dim, dim, 2, self.lanes)
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def entering(self, maps: Tensor, dim: int, reverse: bool = False) -> Tensor:
        """The states (B, blocks, dim - 1, 2, H) that enter the blocks with these maps."""
        kernels, blocks = _kernels(), maps.shape[1]
        groups = -(-blocks // _GROUP)
        first = maps
        constants = {"DIM": dim, "PAD": 2 if dim == 2 else 4, "REVERSE": reverse, "GROUP": _GROUP}
        if groups > 1:
            products = self.maps(dim, groups)
            self.run(
                kernels.compose,
                maps,
                products,
                blocks,
                groups,
                self.lanes,
                blocks=groups,
                **constants,
            )
            first = self.entering(products, dim, reverse)
        states = maps.new_empty(self.batch, blocks, dim - 1, 2, self.lanes)
        self.run(
            kernels.enter,
            maps,
            first,
            states,
            blocks,
            groups,
            self.lanes,
            blocks=groups,
            STARTED=groups > 1,
            **constants,
        )
        return states


class _Quantizers:
    """Codes that go in and come out; none of either for numbers."""

    def __init__(
        self,
        dummy: Tensor,
        bits: int = 0,
        inputs: tuple[Tensor, Tensor] | None = None,
        outputs: tuple[Tensor, Tensor] | None = None,
        levels: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> None:
        # A scale for all sites may go with a zero point for each, but the kernels have one stride.
        in_scale, in_zero = torch.broadcast_tensors(*inputs) if inputs else (dummy, dummy)
        out_scale, out_zero = torch.broadcast_tensors(*outputs) if outputs else (dummy, dummy)
        self.input = (
            in_scale.contiguous(),
            in_zero.contiguous(),
            dummy if levels is None else levels,
        )
        self.output = (
            out_scale.contiguous(),
            out_zero.contiguous(),
            dummy if bounds is None else bounds.contiguous(),
        )
        self.in_site = in_scale.shape[-1] if inputs and in_scale.shape[1] > 1 else 0
        self.out_site = out_scale.shape[-1] if outputs and out_scale.shape[1] > 1 else 0
        self.input_constants = {"BITS": bits, "LEVELS": levels is not None}
        self.constants = {**self.input_constants, "OUT_LEVELS": bounds is not None}


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    parts = empty_parts(v, 2 if source is None else 4)
    _sweep_into(parts, v, source, energy, eta, hopping, two_sided, _Quantizers(v))
    return parts


def sweep_codes(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_bounds: Tensor | None,
    bits: int,
    two_sided: bool,
) -> Tensor:
    codes = v.new_empty(v.shape[0], v.shape[1], out_scale.shape[0], v.shape[2])
    quantizers = _Quantizers(
        v, bits, (in_scale, in_zero), (out_scale, out_zero), in_levels, out_bounds
    )
    _sweep_into(codes, v, source, energy, eta, hopping, two_sided, quantizers)
    return codes


def _sweep_into(
    out: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
    quantizers: _Quantizers,
) -> None:
    kernels = _kernels()
    batch, sites, lanes = v.shape[0], v.shape[1], energy.shape[0]
    launch = _Launch(batch, sites, lanes, energy.dtype, v.device)
    chain = (energy.contiguous(), eta.contiguous(), hopping.contiguous())
    left, right = _entering(launch, v, source, *chain, two_sided, quantizers)
    rows: dict[str, Any] = {
        "LENGTH": launch.length,
        "STARTED": launch.started,
        "SITE_ETA": len(eta) > 1,
        "SITE_HOPPING": len(hopping) > 1,
        **quantizers.constants,
    }
    if two_sided:
        codes = rows["BITS"] != 0
        scratch = energy.new_empty(batch, sites, 2, lanes) if codes else out
        launch.run(
            kernels.two_sided,
            *(v, *chain, left, right, scratch, out, *quantizers.input, *quantizers.output),
            *(*launch.sizes, *v.stride(), quantizers.in_site),
            *(*scratch.stride(), *out.stride(), quantizers.out_site),
            **rows,
        )
        return
    launch.run(
        kernels.causal,
        *(v, v if source is None else source, *chain, left, out),
        *(*quantizers.input, *quantizers.output, *launch.sizes, *v.stride()),
        *((v if source is None else source).stride()),
        *(quantizers.in_site, *out.stride(), quantizers.out_site),
        SOURCE=source is not None,
        **rows,
    )


def _entering(
    launch: _Launch,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
    quantizers: _Quantizers,
) -> tuple[Tensor, Tensor]:
    """(g, psi) that enter the blocks from the left, and r from the right; anything if there is one
    block only."""
    if not launch.started:
        return energy, energy
    dim = 2 if source is None else 3
    left, right = launch.maps(dim), launch.maps(2) if two_sided else energy
    other = v if source is None else source
    launch.run(
        _kernels().sweep_maps,
        *(v, other, energy, eta, hopping, left, right, *quantizers.input),
        *(*launch.sizes, *v.stride(), *other.stride(), quantizers.in_site),
        LENGTH=launch.length,
        SOURCE=source is not None,
        TWO_SIDED=two_sided,
        SITE_ETA=len(eta) > 1,
        SITE_HOPPING=len(hopping) > 1,
        **quantizers.input_constants,
    )
    from_right = launch.entering(right, 2, reverse=True) if two_sided else energy
    return launch.entering(left, dim), from_right


def sweep_backward(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Gradients:
    batch, sites, _, lanes = parts.shape
    launch = _Launch(batch, sites, lanes, parts.dtype, parts.device)
    chain = (energy.contiguous(), eta.contiguous(), hopping.contiguous())
    dv = empty_like_sites(parts)
    dsource = None if source is None else torch.empty_like(dv)
    site_eta, site_hopping = len(eta) > 1, len(hopping) > 1

    def terms(per_site: bool, rows: int) -> Tensor:
        """A term for each row of a parameter, or for each block if all sites share it."""
        shape = (batch, rows if per_site else launch.blocks, lanes)
        return torch.empty(shape, dtype=torch.float64, device=parts.device)

    denergy = terms(False, 0)
    deta, dhopping = terms(site_eta, sites), terms(site_hopping, sites - 1)
    results = (denergy, deta, dhopping)
    rows: dict[str, Any] = {
        "LENGTH": launch.length,
        "SITE_ETA": site_eta,
        "SITE_HOPPING": site_hopping,
    }
    if two_sided:
        assert v is not None
        _two_sided_adjoint(launch, grad, parts, v, chain, dv, results, rows)
    else:
        _causal_adjoint(launch, grad, parts, source, chain[2], dv, dsource, results, rows)
    return (
        dv,
        dsource,
        _total(denergy)[0].to(parts.dtype),
        _total(deta, site_eta).to(parts.dtype),
        _total(dhopping, site_hopping).to(parts.dtype),
    )


def _causal_adjoint(
    launch: _Launch,
    grad: Tensor,
    parts: Tensor,
    source: Tensor | None,
    hopping: Tensor,
    dv: Tensor,
    dsource: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    rows: dict[str, Any],
) -> None:
    kernels, dim = _kernels(), 2 if source is None else 3
    other = dv if source is None else source
    states = dv
    strides = (*launch.sizes, *parts.stride(), *other.stride())
    if launch.started:
        maps = launch.maps(dim)
        launch.run(
            kernels.causal_adjoint_maps,
            *(parts, grad, other, hopping, maps, *strides),
            LENGTH=launch.length,
            SOURCE=source is not None,
            SITE_HOPPING=rows["SITE_HOPPING"],
        )
        states = launch.entering(maps, dim, reverse=True)
    launch.run(
        kernels.causal_adjoint,
        *(parts, grad, other, hopping, states, dv, dv if dsource is None else dsource),
        *(*results, *strides, *dv.stride()),
        SOURCE=source is not None,
        STARTED=launch.started,
        **rows,
    )


def _two_sided_adjoint(
    launch: _Launch,
    grad: Tensor,
    parts: Tensor,
    v: Tensor,
    chain: tuple[Tensor, Tensor, Tensor],
    dv: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    rows: dict[str, Any],
) -> None:
    kernels = _kernels()
    left, right = _entering(launch, v, None, *chain, True, _Quantizers(v))
    left_sums, right_sums = left, right
    strides = (*launch.sizes, *v.stride(), *parts.stride())
    if launch.started:
        left_maps, right_maps = launch.maps(2), launch.maps(2)
        launch.run(
            kernels.two_sided_adjoint_maps,
            *(v, grad, *chain, left, right, left_maps, right_maps, *strides),
            **rows,
        )
        left_sums = launch.entering(left_maps, 2)
        right_sums = launch.entering(right_maps, 2, reverse=True)
    scratch = parts.new_empty(launch.batch, launch.sites, 4, launch.lanes)  # r and T'
    launch.run(
        kernels.two_sided_adjoint,
        *(v, grad, parts, *chain, left, right, left_sums, right_sums, scratch, dv, *results),
        *(*strides, *scratch.stride(), *dv.stride()),
        STARTED=launch.started,
        **rows,
    )


def _total(terms: Tensor, per_site: bool = False) -> Tensor:
    """Sum (B, R, H) over the batch, and over R too for a parameter that all sites share."""
    return ordered_sum(terms) if per_site else ordered_sum(terms.flatten(0, 1)).unsqueeze(0)


def sweep_rounded(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    bounds: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
) -> Tensor:
    return reference.sweep_rounded(
        v, energy, eta, hopping, scale, zero, levels, bounds, group_size, bits, two_sided, sweep
    )


def product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    kernels = importlib.import_module("bkcore.kernels.triton_product")
    codes, row_scale = reference.quantize_rows(x.reshape(-1, x.shape[-1]))
    (rows, inputs), (outputs, groups) = codes.shape, scales.shape
    out = x.new_empty(rows, outputs)
    programs = -(-outputs // _OUTPUTS) * -(-rows // _ROWS)
    if programs:
        with _on(x.device):
            # A term is rounded before it is added, so the two must not be fused.
            kernels.product[(programs,)](
                *(codes, row_scale, weight, weight_levels.levels(x.device), scales, out),
                *(rows, inputs, outputs, groups, group_size, weight.shape[1]),
                BITS=bits,
                ROWS=_ROWS,
                OUTPUTS=_OUTPUTS,
                INPUTS=_INPUTS,
                enable_fp_fusion=False,
            )
    return out.view(*x.shape[:-1], outputs)


def step(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> None:
    batch, _, lanes = state.shape
    launch = _Launch(1, 1, batch * lanes, state.dtype, state.device)
    launch.run(
        _kernels().one_site,
        *(state, v, v if source is None else source, energy, eta, hopping, batch * lanes, lanes),
        SOURCE=source is not None,
    )


def attention(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    first_psi: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels, sizes, tiles = _attention_kernels(), *_attention_sizes(query, value)
    batch, sites, heads, keys, values = *query.shape, value.shape[3]
    parts = sweep(*_chains(v, hopping, energy, eta, first_g), two_sided=False)
    g = parts.view(sites, 2, batch, heads).permute(2, 0, 3, 1).contiguous()
    checkpoints = v.new_empty(batch, heads, sizes[2], 2, keys, values)
    psi = v.new_empty(batch, heads, 2, keys, values)
    out = v.new_empty(batch, sites, heads, 2, values)
    chain = (hopping, g)
    first = psi if first_psi is None else first_psi
    if batch * heads:
        with _on(v.device):
            kernels.states[(batch * heads,)](
                *(*chain, key, value, first, checkpoints, psi, *sizes),
                STARTED=first_psi is not None,
                **tiles,
            )
            kernels.outputs[(batch * heads * sizes[2],)](
                *(*chain, query, key, value, checkpoints, out, *sizes), **tiles
            )
    return g, out, psi, checkpoints if keep else checkpoints[:, :, :0]


def attention_backward(
    dg: Tensor,
    dout: Tensor,
    dpsi: Tensor,
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    g: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    kernels, sizes, tiles = _attention_kernels(), *_attention_sizes(query, value)
    batch, sites, heads, _ = query.shape
    entering, dfirst_psi = torch.empty_like(checkpoints), torch.empty_like(dpsi)
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    local, moved = torch.empty_like(g), torch.empty_like(g)
    if batch * heads:
        with _on(v.device):
            kernels.adjoint_states[(batch * heads,)](
                *(hopping, g, query, dout, dpsi, entering, dfirst_psi, *sizes), **tiles
            )
            kernels.adjoint[(batch * heads * sizes[2],)](
                *(hopping, g, query, key, value, dout, checkpoints, entering),
                *(dquery, dkey, dvalue, local, moved, *sizes),
                **tiles,
            )
    # c^g + <M, w>, conjugated as gradients are.
    drive = local + hopping[..., None] * moved
    grad = torch.stack((dg[..., 0] + drive[..., 0], dg[..., 1] - drive[..., 1]), -1)
    _sweep_v, _, sweep_energy, sweep_eta, bonds = _chains(v, hopping, energy, eta, first_g)

    def chains(x: Tensor) -> Tensor:
        return x.permute(1, 3, 0, 2).reshape(1, sites, 2, batch * heads)

    dv, _, _, deta, dbonds = sweep_backward(
        chains(grad),
        chains(g),
        None,
        None,
        sweep_energy,
        sweep_eta.expand(sites, -1),
        bonds,
        two_sided=False,
    )
    dv = dv.view(sites, batch, heads).transpose(0, 1).contiguous()
    p = torch.stack((-dv, -deta.view(sites, batch, heads).transpose(0, 1)), -1)
    dhopping = g[..., 0] * moved[..., 0] - g[..., 1] * moved[..., 1]
    if sites > 1:
        rows = dbonds.expand(sites - 1, -1).view(sites - 1, batch, heads)
        dhopping[:, 1:] += rows.transpose(0, 1)
    first = hopping[:, 0, :, None] * p[:, 0]
    if first_g is not None:
        dhopping[:, 0] += 2 * (first[..., 0] * first_g[..., 0] - first[..., 1] * first_g[..., 1])
    dfirst_g = hopping[:, 0, :, None] * first * first.new_tensor([1, -1])
    denergy, deta = (ordered_sum(x.flatten(0, 1)) for x in (p[..., 0], -p[..., 1]))
    return dv, dhopping, denergy, deta, dquery, dkey, dvalue, dfirst_g, dfirst_psi


def _chains(
    v: Tensor, hopping: Tensor, energy: Tensor, eta: Tensor, first_g: Tensor | None
) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    """The arguments of a sweep (1, N, B * H) with a hopping of its own for every bond of every
    chain. What enters the first site, t^2 g, joins its diagonal."""
    batch, sites, heads = v.shape
    lanes = batch * heads

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(sites, lanes)

    potential, width = rows(v), eta.repeat(batch).view(1, lanes)
    if first_g is not None:
        pull = (hopping[:, 0].square()[..., None] * first_g).view(lanes, 2)
        potential = potential.clone()
        potential[0] -= pull[:, 0]
        width = width.repeat(sites, 1)
        width[0] += pull[:, 1]
    bonds = rows(hopping)[1:] if sites > 1 else potential.new_zeros(1, lanes)
    return potential[None], None, energy.repeat(batch), width, bonds


def _attention_kernels() -> Any:
    return importlib.import_module("bkcore.kernels.triton_attention")


def _attention_sizes(query: Tensor, value: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """(N, H, chunks, K, U), and the sizes of tiles: powers of two, as products of them need."""
    _, sites, heads, keys = query.shape
    values = value.shape[3]
    tiles = {"KEYS": _tile(keys), "VALUES": _tile(values), "CHUNK": ATTENTION_CHUNK}
    return (sites, heads, -(-sites // ATTENTION_CHUNK), keys, values), tiles


def _tile(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _on(device: torch.device) -> Any:
    """The context in which kernels go to this device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


BACKEND = Backend(
    name="triton",
    absent=absent,
    refuses=refuses,
    describe=lambda: (None, None),
    sweep=sweep,
    sweep_backward=sweep_backward,
    sweep_codes=sweep_codes,
    sweep_rounded=sweep_rounded,
    product=product,
    round_channels=reference.round_channels,
    round_channels_backward=reference.round_channels_backward,
    round_rows=reference.round_rows,
    round_weight=reference.round_weight,
    round_weight_backward=reference.round_weight_backward,
    step=step,
    attention=attention,
    attention_backward=attention_backward,
    reads_bfloat16=True,
)
