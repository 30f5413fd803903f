"""Every rival gives the diagonal that bkcore gives."""

import pytest
import torch

from bkcore import resolvent_diagonal
from bkcore.bench import rival_solvers
from bkcore.bench.rival_solvers import (
    Rival,
    banded_solve,
    dense_inverse,
    eager_loop,
    missing_rivals,
    rivals,
    scan_from_both_ends,
)
from bkcore.errors import BenchmarkError

WAYS = {
    "eager loop": eager_loop,
    "dense inverse": dense_inverse,
    "compiled scan": lambda v: torch.complex(*scan_from_both_ends(v)),
    "banded solver": banded_solve,
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("sites", [2, 33])
def test_same_diagonal(name: str, sites: int) -> None:
    v = torch.randn(3, sites, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(WAYS[name](v), resolvent_diagonal(v, 1j), rtol=1e-4, atol=1e-5)


def test_all_rivals_are_tested() -> None:
    assert {rival.name for rival in rivals()} | set(missing_rivals()) == set(WAYS)


def test_what_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert set(missing_rivals()) == {"compiled scan", "banded solver"}
    assert [rival.name for rival in rivals()] == ["eager loop", "dense inverse"]


def test_a_slow_rival_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_solvers, "MOST_SECONDS", 0.0)
    found = list(rival_solvers._compare(Rival("eager loop", eager_loop, 1, (8, 16)), 1))
    assert [result.shape for result in found] == [(16, 8)]


def test_a_wrong_rival_is_not_timed() -> None:
    wrong = Rival("wrong", lambda v: 1.01 * eager_loop(v), 1, (8,))
    with pytest.raises(BenchmarkError, match="wrong result"):
        next(rival_solvers._compare(wrong, 1))
