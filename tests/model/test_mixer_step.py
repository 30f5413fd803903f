"""One site in one call gives the bits of the pieces that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import recall_step, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.model import ResNetBKConfig
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.mixer import ResolventMixer
from bkcore.model.state import LayerState
from bkcore.quantization import QuantizationConfig

MODES = (None, "ptq_int8", "ptq_int4")


def mixer(mode: str | None, *, seed: int = 0, flat: bool = False, **sizes: int) -> Any:
    """A mixer with strong gates and barriers, quantized as `mode` says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defaults: dict[str, Any] = {"vocab_size": 9, "d_model": 24, "num_heads": 4, "key_size": 7}
        made: Any = ResolventMixer(ResNetBKConfig(**{**defaults, **sizes})).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        made.log_eta.data.sub_(4)
        if mode is not None:
            config = QuantizationConfig(mode, per_channel=not flat)
            parts = (made.heads, made.keys, made.width)
            made.quantizers = CoreQuantizers(*parts, config, learnable=False)
            made.quantizers.phase = "observe"
            with torch.no_grad():
                made(torch.randn(2, 60, made.in_proj.in_features))
            for part in made.quantizers.parts():
                part.end_calibration()
            made.quantizers.phase = "quantize"
    return made


def read(made: Any, x: Tensor, *, in_pieces: bool) -> tuple[Tensor, LayerState]:
    """Site by site, by the kernel or by what it stands for."""
    made = copy.deepcopy(made)
    if in_pieces:
        made._steps = lambda inputs: False
    else:
        made.recall = None  # not to be called
    outs, state = [], made.first_state(len(x))
    with torch.no_grad():
        for site in x.unbind(1):
            out, state = made(site[:, None], state)
            outs.append(out)
    return torch.cat(outs, 1), state


def assert_same_bits(made: ResolventMixer, x: Tensor) -> None:
    (one, end), (other, last) = (read(made, x, in_pieces=which) for which in (False, True))
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    for found, expected in zip(vars(end).values(), vars(last).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@given(
    mode=st.sampled_from(MODES),
    flat=st.booleans(),
    batch=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (6, 1)]),
    key_size=st.sampled_from([1, 5, 16]),
    value_size=st.sampled_from([3, 12, 33]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e30]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_sizes_and_extremes(mode, flat, batch, heads, key_size, value_size, scale, seed):
    heads, groups = heads
    sizes = {"num_heads": heads, "key_groups": groups, "key_size": key_size}
    made = mixer(mode, seed=seed, flat=flat, value_size=value_size, **sizes)
    random = torch.Generator().manual_seed(seed)
    assert_same_bits(made, scale * torch.randn(batch, 6, 24, generator=random))


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize("mode", MODES)
def test_every_instruction_set(mode, isa):
    x = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(1))
    with native.use_isa(isa):
        assert_same_bits(mixer(mode), x)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_where_it_is(mode):
    x = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(1))
    x[1, 2, 3] = torch.nan
    x[3, 2, 3] = torch.inf
    made = mixer(mode)
    assert_same_bits(made, x)
    out, _ = read(made, x, in_pieces=False)
    assert out[[0, 2]].isfinite().all()
    assert not out[1, 2:].isfinite().any()


@pytest.mark.parametrize("mode", MODES)
def test_many_sequences_and_threads(mode):
    made = mixer(mode, num_heads=8, value_size=32, key_size=32)
    x = torch.randn(70, 3, 24, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = read(made, x, in_pieces=False)
        torch.set_num_threads(2)
        assert_same_bits(made, x)
        assert torch.equal(read(made, x, in_pieces=False)[0], one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["ptq_int8", "ptq_int4"])
def test_other_scales_and_levels_are_noticed(mode):
    """Whether they are written over or exchanged; nothing of the old ones is kept."""
    made, x = mixer(mode), torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))
    before, _ = read(made, x, in_pieces=False)
    made.quantizers.load_state_dict(mixer(mode, seed=5).quantizers.state_dict())
    assert not torch.equal(read(made, x, in_pieces=False)[0], before)
    assert_same_bits(made, x)
    part = made.quantizers.value
    with torch.no_grad():
        made(x[:, :1])
    part.stored_scales = 2 * part.stored_scales
    part.zero_points = part.zero_points + 1
    assert_same_bits(made, x)
    again = copy.deepcopy(made)
    again.quantizers.gate.stored_scales.mul_(3)
    again.quantizers.found.imag.zero_points.sub_(5)
    if mode == "ptq_int4":
        again.quantizers.key.table.stored_levels.mul_(1.5)
    assert not torch.equal(read(again, x, in_pieces=False)[0], read(made, x, in_pieces=False)[0])
    assert_same_bits(again, x)
    assert_same_bits(again.double().float(), x)


@pytest.mark.parametrize("mode", MODES)
def test_another_backend_gives_the_bits_of_its_pieces(mode):
    made, x = mixer(mode), torch.randn(2, 3, 24)
    with use_backend("reference"):
        assert_same_bits(made, x)


def test_what_it_is_not_for_takes_the_pieces():
    made, x = mixer("ptq_int8"), torch.randn(2, 1, 24)
    with torch.no_grad():
        expected, state = made(x)
    with torch.no_grad():
        inputs, _, _ = made.core_inputs(x, made.first_state(2))
        assert made._steps(inputs)
        with use_backend("reference"):
            assert made._steps(inputs)
            torch.testing.assert_close(made(x)[0], expected)
        assert not made._steps(type(inputs)(*(part.double() for part in inputs)))
        for phase in ("idle", "observe"):
            made.quantizers.phase = phase
            assert not made._steps(inputs)
        made.quantizers.phase = "quantize"
    assert not made._steps(inputs)  # there may be a gradient to keep
    assert torch.equal(made(x)[0], expected)
    assert torch.equal(made(x, state)[0], made(x, LayerState(**vars(state)))[0])


def arguments(made: ResolventMixer) -> list[Any]:
    state = made.first_state(2)
    inputs, _, _ = made.core_inputs(torch.randn(2, 1, 24), state)
    cores = [made.log_rate.exp(), made.log_barrier.exp(), made.log_eta.exp()]
    named = inputs._asdict()
    names = ("gate", "barrier", "query", "key", "value")
    return [*(named[n] for n in names), *cores, made.features.weight, state.g, state.psi]


@torch.no_grad()
def test_bad_input_raises():
    made = mixer("ptq_int8")
    good, rounding = arguments(made), made.quantizers.rounding()
    recall_step(*[*good, rounding])
    names = ("gate", "barrier", "query", "key", "value", "rate", "height", "eta", "weight", "g")
    for index, name in enumerate(names):
        if name == "value":
            continue  # its shape is right by definition of H U
        bad = list(good)
        bad[index] = torch.cat((good[index], good[index]))
        with pytest.raises(ShapeError, match=rf"^{name} must be"):
            recall_step(*bad)
        bad[index] = good[index].double()
        with pytest.raises(DTypeError, match=rf"^{name} must be torch.float32"):
            recall_step(*bad)
    with pytest.raises(ShapeError, match="psi must be"):
        recall_step(*[*good[:-1], good[-1][0]])
    with pytest.raises(ShapeError, match="groups of 7 that 4 heads share"):
        recall_step(*[*good[:2], good[2][..., :-1], *good[3:]])
    with pytest.raises(ShapeError, match="groups of 7 that 4 heads share"):
        recall_step(*[*good[:2], good[2][..., :0], *good[3:]])
    with pytest.raises(InputError, match="one entry for each of gate, barrier"):
        recall_step(*[*good, rounding[:3]])
    with pytest.raises(ShapeError, match="gate has 4 channels"):
        recall_step(*[*good, rounding[::-1]])
    with pytest.raises(ShapeError, match="with 4 bits; gate has 8"):
        recall_step(*[*good, [*rounding[:-1], mixer("ptq_int4").quantizers.rounding()[-1]]])
    for eta in (0.0, -1e-3):
        bad = list(good)
        bad[7] = good[7].clone()
        bad[7][2] = eta
        with pytest.raises(InputError, match="eta must be > 0"):
            recall_step(*[*bad, rounding])
    wanted = r"weight requires one: call it under torch.no_grad\(\)"
    with torch.enable_grad(), pytest.raises(InputError, match=wanted):
        recall_step(*good)
