"""The step that other backends compose of pieces is the one that the CPU's kernel computes.

`tests/model/test_mixer_step.py` compares the kernel with the mixer.
"""

from __future__ import annotations

import pytest
import torch

from bkcore import kernels
from bkcore.errors import InputError
from bkcore.kernels.backends import cpu
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
