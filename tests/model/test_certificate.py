"""The certificate of a language model's cores, against dense resolvents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkcore.core.enclosures import Enclosure
from bkcore.errors import LifecycleError
from bkcore.model import core_certificates
from bkcore.model.certificate import _over_power
from bkcore.model.mixer import ResolventMixer


def dense_core(mixer: ResolventMixer, x: Tensor) -> Tensor:
    """What a mixer without quantizers finds for its inputs, by matrix inverses, (B, N, 2, D)."""
    inputs, _, _ = mixer.core_inputs(x, mixer.first_state(len(x)))
    query, key, value = (
        part.double().unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for part in inputs[:3]
    )
    rate, height, eta = (
        x.exp().double() for x in (mixer.log_rate, mixer.log_barrier, mixer.log_eta)
    )
    t = torch.exp(-2 * rate * torch.sigmoid(inputs.gate.double())).transpose(1, 2)
    v = (height * torch.nn.functional.softplus(inputs.barrier.double())).transpose(1, 2)
    sites = t.shape[-1]
    lower = torch.eye(sites, dtype=torch.float64) - torch.diag_embed(t[..., 1:], -1)
    shifted = lower @ lower.mT + torch.diag_embed(v - 1j * eta[:, None])
    rows = torch.zeros_like(shifted)
    for i in range(sites):
        rows[..., i, : i + 1] = torch.linalg.inv(shifted[..., : i + 1, : i + 1])[..., i, :]
    out = (rows * (query @ key.mT)) @ value.to(rows.dtype)
    remembered = rows.abs().square().sum(-1, keepdim=True)  # Ward: Im g / eta
    parts = [out.real / remembered**0.5, out.imag / eta[:, None, None] / remembered**1.5]
    return torch.stack([part.transpose(1, 2).flatten(2) for part in parts], 2)


def run(model, ids):
    """What entered every mixer, and what its core found, (B, N, 2, W)."""
    seen, found = [], []
    hooks = []
    for layer in model.layers:
        mixer = layer.mixer
        hooks.append(mixer.register_forward_pre_hook(lambda _, a: seen.append(a[0])))
        hooks.append(mixer.features.register_forward_pre_hook(lambda _, a: found.append(a[1])))
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen, found


@torch.no_grad()
@pytest.mark.parametrize("state", ["quantized", "training"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_bound_covers_the_error(build, tokens, mode, state, clip):
    if state == "training" and not mode.startswith("qat"):
        pytest.skip("no training in this mode")
    model, ids = build(mode, state), tokens(2, 13)
    if clip:
        for layer in model.layers:
            *inputs, real, imag = layer.mixer.quantizers.parts()
            for part in (*inputs, real, imag):
                # What clipped inputs make is small, and must be clipped nevertheless.
                by = 10 if part in (real, imag) else 2
                (part.log_scales if part.learnable else part.stored_scales.log_()).sub_(by)
                if not part.learnable:
                    part.stored_scales.exp_()
    logits, seen, found = run(model, ids)
    certificates = core_certificates(model, ids)
    assert [c.layer for c in certificates] == [0, 1]
    assert torch.equal(model(ids).logits, logits)
    for certificate, layer, x, parts in zip(certificates, model.layers, seen, found, strict=True):
        # The error is that of the forward pass.
        error = (parts.double() - dense_core(layer.mixer, x)).abs()
        torch.testing.assert_close(certificate.error, error, rtol=0, atol=2e-5)
        assert bool((certificate.error <= certificate.bound).all())
        # Not by saying nothing: |y| <= sqrt(U) alone would be a bound.
        if not clip and mode.endswith("int8"):
            assert float(certificate.bound.mean()) < 1
        assert set(certificate.clipped) == {*mixer_names(), "found.real", "found.imag"}
        assert not clip or min(certificate.clipped.values()) > 0


def mixer_names() -> set[str]:
    return {"query", "key", "value", "gate", "barrier"}


def test_a_float_core_has_no_certificate(build, tokens):
    for model in (build(), build("ptq_int8", "calibrated")):
        with pytest.raises(LifecycleError, match="runs in float"):
            core_certificates(model, tokens(1, 4))


@pytest.mark.parametrize("power", [0.5, 1.5])
def test_the_ball_behind_the_quotient(power):
    centre = torch.randn(200, 5, dtype=torch.float64) * torch.logspace(-3, 1, 200)[:, None]
    radius = torch.rand(200, 5, dtype=torch.float64) * torch.logspace(-4, 1, 20).repeat(10)[:, None]
    w = torch.rand(200, dtype=torch.float64) + 0.5
    off = 0.9 * torch.rand(200, dtype=torch.float64) * w
    ball = _over_power(Enclosure(centre, radius), Enclosure(w, off), power)
    reached = torch.zeros_like(centre)
    for x in (centre - radius, centre, centre + radius):
        for y in (w - off, w, w + off):
            distance = (x / y[:, None] ** power - ball.centre).abs()
            assert (distance <= ball.radius).all()
            reached = torch.maximum(reached, distance)
    assert (reached >= 0.99 * ball.radius).all()


def test_a_memory_that_may_be_none_bounds_nothing():
    one = torch.ones(1, 1, dtype=torch.float64)
    assert _over_power(Enclosure(one, one), Enclosure(one[0], 2 * one[0]), 0.5).radius.isinf().all()
