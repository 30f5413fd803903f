"""The extension that was compiled is the one that the Python code was written for."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bkcore.errors import BackendError
from bkcore.kernels import describe_backends, sweep, use_backend
from bkcore.kernels.backends import selection
from bkcore.kernels.backends.cpu import native

SOURCES = Path(__file__).parents[4] / "csrc"

# The interface, and a digest of what defines it. Where that differs, functions of the extension may
# take or give something else. If they do, raise INTERFACE in native.py and kInterface in
# module.cpp; put both here.
INTERFACE = (2, "a11567bb01976dac")


def definition(module: str, arguments: str) -> list[str]:
    """How every argument is read, of what type and by which name, and how memory is described."""
    read = re.findall(r'(\w+(?:<[\w\s:]*>)?)\("(\w+)"', module)
    code = re.sub(r"//.*", "", arguments)
    return [*(" ".join(each) for each in read), *code.split()]


@pytest.mark.skipif(not SOURCES.exists(), reason="the sources of the extension are not here")
def test_another_interface_has_another_number():
    module, arguments = ((SOURCES / name).read_text() for name in ("module.cpp", "arguments.h"))
    parts = definition(module, arguments)
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    assert (native.INTERFACE, digest) == INTERFACE


@pytest.mark.skipif(not SOURCES.exists(), reason="the sources of the extension are not here")
def test_the_interface_is_names_types_and_the_layout_of_memory():
    module, arguments = ((SOURCES / name).read_text() for name in ("module.cpp", "arguments.h"))
    before = definition(module, arguments)
    assert len(before) > 500
    for old, new in (('"query"', '"queries"'), ("<const float>(", "<const double>(")):
        assert definition(module.replace(old, new, 1), arguments) != before
    swapped = arguments.replace("std::tuple<Address, Index>", "std::tuple<Index, Address>")
    assert definition(module, swapped) != before
    assert definition(module, arguments + "// said otherwise\n") == before


@pytest.mark.parametrize("found", [None, 0, native.INTERFACE + 1])
def test_an_extension_of_another_interface_is_refused_with_the_remedy(monkeypatch, found):
    stale = SimpleNamespace() if found is None else SimpleNamespace(__interface__=found)
    monkeypatch.setattr(importlib, "import_module", lambda name: stale)
    loaded, reason = native._load()
    assert loaded is None
    monkeypatch.setattr(native, "_native", loaded)
    monkeypatch.setattr(native, "_import_error", reason)
    monkeypatch.setattr(selection, "_warned", set())
    said = rf"has interface {found}, but this Python code needs {native.INTERFACE}.*pip install"
    assert not describe_backends()["cpu"].available
    x = torch.ones(1, 2, 3)
    args = (x, None, torch.zeros(3), torch.ones(1, 3), torch.ones(1, 3), False)
    with pytest.raises(BackendError, match=said), use_backend("cpu"):
        pass
    with pytest.warns(UserWarning, match=said):
        sweep(*args)


def test_the_extension_here_has_the_interface():
    assert native._load() == (native._native, "")


def layout(x: torch.Tensor, **other: Any) -> native.Layout:
    """x (B, N, H) as the extension takes it, but for what `other` says of sizes or strides."""
    found = native.sequence(x)
    assert found is not None
    address, width, sizes, strides = found
    return address, width, other.get("sizes", sizes), other.get("strides", strides)


def sweep_arguments(sites: int = 2, lanes: int = 20) -> dict[str, object]:
    v = torch.ones(1, sites, lanes)
    row = torch.ones(1, 1, lanes)
    sums = ["denergy", "deta", "dhopping"]
    outputs = {name: torch.zeros(1, 1, lanes) for name in sums}
    parts = torch.ones(1, sites, 2, lanes)
    kept = [v, row, parts, outputs]
    return {
        "isa": native.isa(),
        "threads": 1,
        "double": False,
        "two_sided": False,
        "cache_bytes": 1 << 20,
        "batch": 1,
        "sites": sites,
        "lanes": lanes,
        **dict.fromkeys(("energy", "eta", "hopping"), layout(row, strides=(0, 0, 0, 1))),
        **dict.fromkeys(("v", "dv"), layout(v)),
        **dict.fromkeys(("source", "dsource")),
        **dict.fromkeys(("parts", "grad"), native.sequence_of_parts(parts)),
        **{name: layout(x, strides=(0, 0, 0, 1)) for name, x in outputs.items()},
        "kept": kept,
    }


def backward(**other: object) -> None:
    args = {**sweep_arguments(), **other}
    kept = args.pop("kept")
    native._native.sweep_backward(args)
    del kept


def test_what_is_written_to_is_not_expanded():
    backward()
    sums = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="denergy is written to, but expanded along axis 3"):
        backward(denergy=layout(sums, sizes=(1, 1, 1, 1), strides=(0, 0, 0, 0)))


def test_a_gradient_of_a_source_comes_with_a_source():
    source = torch.ones(1, 2, 20)
    with pytest.raises(ValueError, match="dsource comes without source"):
        backward(dsource=layout(source))
    parts = torch.ones(1, 2, 4, 20)
    four = dict.fromkeys(("parts", "grad"), native.sequence_of_parts(parts))
    with pytest.raises(ValueError, match="source comes without dsource"):
        backward(**four, source=layout(source))


def test_an_argument_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="nothing is not known"):
        backward(nothing=None)


def test_a_two_sided_sweep_has_no_source_and_threads_are_counted_from_1():
    source = torch.ones(1, 2, 20)
    with pytest.raises(ValueError, match="a two-sided sweep has no source"):
        backward(two_sided=True, source=layout(source), dsource=layout(source))
    with pytest.raises(ValueError, match="there are 0 threads"):
        backward(threads=0)


def test_a_stride_along_an_axis_of_one_is_no_way_to_anywhere():
    """Long chains are cut into blocks, which begin at other sites than the first."""
    sites, parts = 1100, torch.empty(1, 1100, 2, 1)
    v, one, args = torch.zeros(1, sites, 1), torch.ones(1, 1, 1), sweep_arguments(sites, 1)
    for name in ("kept", "grad", "dv", "dsource", "denergy", "deta", "dhopping"):
        args.pop(name)
    args.update(v=layout(v), parts=native.sequence_of_parts(parts), sequential=False)
    results = []
    for step in (0, 1 << 40):
        energy = layout(one, strides=(step, step, step, step))
        native._native.sweep(
            {
                **args,
                "energy": energy,
                "eta": layout(one, strides=(0,) * 4),
                "hopping": layout(one, strides=(0,) * 4),
            }
        )
        results.append(parts.clone())
    assert torch.equal(*results)


def test_a_chain_of_one_site_has_a_bond_in_memory_all_the_same():
    args = sweep_arguments(sites=1)
    nothing = (0, 4, (1, 0, 1, 20), (0, 0, 0, 1))
    with pytest.raises(ValueError, match="hopping has the size 0 along axis 1 instead of 1"):
        backward(**{**args, "hopping": nothing})


def test_codes_are_swept_over_lanes_that_lie_side_by_side():
    lanes = 20
    codes, out = torch.zeros(1, 2, lanes, dtype=torch.int8), torch.zeros(1, 2, 2, lanes)
    row, one = torch.ones(1, 1, lanes), torch.ones(1, 1, 1)
    along = layout(row, strides=(0, 0, 0, 1))
    args = {
        "isa": native.isa(),
        "threads": 1,
        "bits": 8,
        "two_sided": False,
        "batch": 1,
        "sites": 2,
        "lanes": lanes,
        "energy": along,
        "eta": along,
        "hopping": along,
        "v": native.buffer(codes),
        "source": None,
        "codes": native.buffer(out.to(torch.int8)),
        "in_levels": None,
        "out_bounds": None,
        **dict.fromkeys(("in_scale", "in_zero"), along),
        **dict.fromkeys(("out_scale", "out_zero"), layout(one, strides=(0, 0, 0, 0))),
    }
    result = out.to(torch.int8)
    args["codes"] = native.buffer(result)
    native._native.sweep_codes(args)
    for name in ("energy", "eta", "hopping"):
        expanded = layout(one, sizes=(1, 1, 1, 1), strides=(0, 0, 0, 0))
        with pytest.raises(ValueError, match=f"{name} has lanes 0 numbers apart"):
            native._native.sweep_codes({**args, name: expanded})
