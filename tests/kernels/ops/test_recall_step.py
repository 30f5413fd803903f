"""Every backend has the step; what others compose of pieces is what the CPU's kernel computes.

`tests/model/test_mixer_step.py` compares the kernel with the mixer.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bkcore import kernels
from bkcore.errors import BackendError, InputError
from bkcore.kernels.backends import cpu, selection, triton
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import RecallStep
from bkcore.kernels.backends.reference import attention as reference
from tests.kernels.operators import arguments


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_pieces_give_the_bits_of_the_kernel(rounded, first):
    args = arguments("recall_step")
    rounding = args.pop("rounding") if rounded else []
    args.pop("rounding", None)
    if first:
        args["g"], args["psi"] = torch.zeros_like(args["g"]), torch.zeros_like(args["psi"])
    with torch.no_grad():
        expected = kernels.recall_step(**args, rounding=rounding)
        pieces = reference.recall_step(RecallStep(**args), rounding, cpu.BACKEND.attention)
        alone = reference.recall_step(RecallStep(**args), rounding)
    for one, other, want in zip(pieces, alone, expected, strict=True):
        assert torch.equal(one, want)
        # The reference's attention rounds otherwise: a hundred roundings of 6e-8, over eta >= 0.3.
        # Where codes are made of it, one at a tie may become its neighbour.
        if not rounded:
            torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rounded", [False, True])
def test_every_backend_has_it(backend, rounded):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton's kernels take tensors on the CPU in its interpreter only")
    args = arguments("recall_step")
    if not rounded:
        args["rounding"] = []
    with torch.no_grad():
        assert kernels.has_recall_step(args["value"])
        expected = kernels.recall_step(**args)
        with kernels.use_backend(backend):
            assert kernels.has_recall_step(args["value"])
            found = kernels.recall_step(**args)
    for got, want in zip(found, expected, strict=True):
        if rounded:  # a code at a tie may become its neighbour
            assert (got - want).abs().median() <= 1e-6
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_asking_for_it_raises_nothing_where_a_call_would(monkeypatch):
    args = arguments("recall_step")
    gone = dataclasses.replace(triton.BACKEND, absent=lambda: "it is not here")
    monkeypatch.setitem(selection._BACKENDS, "triton", gone)
    monkeypatch.setattr(selection, "_environment", "triton")
    with torch.no_grad():
        assert kernels.has_recall_step(args["value"])
        with pytest.raises(BackendError, match="it is not here"):
            kernels.recall_step(**args)
        assert not kernels.has_recall_step(args["value"].double())
    assert not kernels.has_recall_step(args["value"])


def test_it_is_there_without_the_extension(monkeypatch):
    args = arguments("recall_step")
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(selection, "_warned", {"cpu"})
    with torch.no_grad():
        with kernels.use_backend("reference"):
            expected = kernels.recall_step(**args)
        for got, want in zip(kernels.recall_step(**args), expected, strict=True):
            assert torch.equal(got, want)


def test_it_works_on_any_device():
    args = arguments("recall_step")
    rounding = [
        dataclasses.replace(
            part,
            **{name: getattr(part, name).to("meta") for name in ("scale", "zero", "levels")},
        )
        for part in args["rounding"]
    ]
    meta = {name: x.to("meta") for name, x in args.items() if name != "rounding"}
    with torch.no_grad():
        found = kernels.recall_step(**meta, rounding=rounding)
        expected = kernels.recall_step(**args)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert all(x.is_meta for x in found)
        with pytest.raises(InputError, match="gate is on meta, but to be rounded on cpu"):
            kernels.recall_step(**meta, rounding=args["rounding"])


def test_a_gradient_that_would_be_lost_is_refused():
    args = arguments("recall_step")
    kernels.recall_step(**args)  # nothing requires one
    args["psi"].requires_grad_()
    with pytest.raises(InputError, match=r"recall_step has no derivative, and psi requires one"):
        kernels.recall_step(**args)


def test_the_pieces_refuse_what_the_kernel_refuses():
    args = arguments("recall_step")
    rounding = args.pop("rounding")
    args["eta"][1] = 0
    for step in (
        lambda: kernels.recall_step(**args, rounding=rounding),
        lambda: reference.recall_step(RecallStep(**args), rounding),
    ):
        with torch.no_grad(), pytest.raises(InputError, match="eta must be > 0"):
            step()
