"""Old names, which warn and redirect to the new ones for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES: Mapping[str, tuple[str, ...]] = {
    "bkcore.bench.comparison": ("bkcore.bench.rival_solvers",),
    "bkcore.bench.process": ("bkcore.bench.process_memory",),
    "bkcore.bench.rivals": ("bkcore.bench.rival_models",),
    "bkcore.kernels.backend": ("bkcore.kernels.backends.interface", "bkcore.kernels.layout"),
    "bkcore.kernels.codes": ("bkcore.kernels.ops.sweep_codes",),
    "bkcore.kernels.cpu": ("bkcore.kernels.backends.cpu.native", "bkcore.host"),
    "bkcore.kernels.reference": (
        "bkcore.kernels.backends.reference.sweep",
        "bkcore.kernels.backends.reference.codes",
        "bkcore.kernels.backends.reference.attention",
    ),
    "bkcore.kernels.round": ("bkcore.kernels.ops.round_activations",),
    "bkcore.kernels.rounded": ("bkcore.kernels.ops.sweep_rounded",),
    "bkcore.kernels.selection": ("bkcore.kernels.backends.selection",),
    "bkcore.kernels.stream": ("bkcore.kernels.ops.sweep_step",),
    "bkcore.kernels.triton": ("bkcore.kernels.backends.triton.launch",),
    "bkcore.kernels.triton_attention": ("bkcore.kernels.backends.triton.attention_kernels",),
    "bkcore.kernels.triton_product": ("bkcore.kernels.backends.triton.product_kernels",),
    "bkcore.kernels.triton_sweep": (
        "bkcore.kernels.backends.triton.sweep_kernels",
        "bkcore.kernels.backends.triton.sweep_adjoint_kernels",
    ),
    "bkcore.kernels.weight": ("bkcore.kernels.ops.round_weight",),
    "bkcore.kernels.weight_levels": ("bkcore.kernels.int4_levels",),
    "bkcore.memory": ("bkcore.host",),
    "bkcore.model.quantized": ("bkcore.model.conversion",),
    "bkcore.model.receipt_file": ("bkcore.quantization.receipt_file",),
    "bkcore.products": ("bkcore.training.onednn",),
    "bkcore.report": ("bkcore.commands",),
    "bkcore.report.budget": ("bkcore.evaluation.bit_budget", "bkcore.commands.bit_budget_tables"),
    "bkcore.report.command": ("bkcore.commands.running",),
    "bkcore.report.console": ("bkcore.display.console",),
    "bkcore.report.curve": ("bkcore.commands.train",),
    "bkcore.report.demo": (
        "bkcore.comparison.demo",
        "bkcore.commands.demo",
        "bkcore.evaluation.rows",
    ),
    "bkcore.report.evaluate": ("bkcore.commands.evaluate", "bkcore.evaluation.rows"),
    "bkcore.report.export": ("bkcore.commands.export",),
    "bkcore.report.files": ("bkcore.commands.files", "bkcore.display.plots"),
    "bkcore.report.generate": ("bkcore.commands.generate",),
    "bkcore.report.progress": ("bkcore.display.progress",),
    "bkcore.report.quantize": (
        "bkcore.commands.quantize_steps",
        "bkcore.commands.quantize_settings",
        "bkcore.evaluation.checkpoints",
    ),
    "bkcore.report.receipt": ("bkcore.commands.receipt", "bkcore.quantization.budget"),
    "bkcore.report.recipe": ("bkcore.training.recipe",),
    "bkcore.report.train": ("bkcore.commands.train_steps",),
    "bkcore.text.files": ("bkcore.text.text_files",),
    "bkcore.training.checkpoints": ("bkcore.training.resuming",),
}
"""From the path of a module to those that have its names now. `bkcore.kernels.attention` and
`product` are missing: these are functions, which the modules of the same names would hide."""


def _renamed(old: str, new: str, names: str) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in names.split()}


NAMES: Mapping[str, str] = {
    "bkcore.bench.timing.torch_threads": "bkcore.host.torch_threads",
    "bkcore.core.bounds.AttentionInputs": "bkcore.core.attention.AttentionInputs",
    **_renamed(
        "bkcore.core.bounds",
        "bkcore.core.enclosures",
        "UNIT AttentionEnclosure Enclosure attention_enclosure diagonal_enclosure "
        "propagated_enclosure",
    ),
    **_renamed(
        "bkcore.evaluation.checkpoints",
        "bkcore.evaluation.evaluate",
        "Evaluation Progress Setting check_length evaluate_checkpoint evaluate_in_new_process",
    ),
    "bkcore.evaluation.rows.average_bits": "bkcore.quantization.budget.average_bits",
    "bkcore.kernels.selection.backends": "bkcore.kernels.describe_backends",
    "bkcore.kernels.step": "bkcore.kernels.sweep_step",
    "bkcore.kernels.stream.step": "bkcore.kernels.sweep_step",
    **_renamed("bkcore.model.receipt", "bkcore.quantization.receipt_file", "find read write"),
    **_renamed(
        "bkcore.quantization.observers",
        "bkcore.quantization.range_search",
        "affine_from_range bin_centers",
    ),
    "bkcore.report.budget.Judge": "bkcore.evaluation.evaluate.Scorer",
    "bkcore.training.trainer.best_checkpoint": "bkcore.training.best_checkpoint",
}
"""From the full name of a function or a class to its new one."""


def moved_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names or submodules have moved."""

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        if old in MODULES:
            return importlib.import_module(old)
        if old not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, new = _place(old, NAMES[old])
        return getattr(place, new)

    return find


def called_module(name: str, new: str) -> None:
    """Make a module callable, since a function had its name before."""

    class Called(ModuleType):
        def __call__(self, *args: Any) -> Any:
            place, function = _place(f"{name}()", new)
            return getattr(place, function)(*args)

    sys.modules[name].__class__ = Called


class _MovedModule(ModuleType):
    """Reads the attributes of the modules that have its names now.

    It cannot pass on what is set: pytest's `monkeypatch`, which does not find a name in the moved
    module's own dictionary, would delete it from the new one at the end.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system looks for
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        place, new = self._place(name)
        return getattr(place, new)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, _MovedModule):  # what the import system sets
            super().__setattr__(name, value)
        else:
            raise AttributeError(f"{self.__name__} has moved: {self._where()}; set {name!r} there")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self.__name__} has moved: {self._where()}; delete {name!r} there")

    def _where(self) -> str:
        return "it is " + " and ".join(MODULES[self.__name__]) + " now"

    def _place(self, name: str) -> tuple[ModuleType, str]:
        old = f"{self.__name__}.{name}"
        if old in NAMES:
            return _place(old, NAMES[old], stacklevel=4)
        for place in MODULES[self.__name__]:
            if name in vars(importlib.import_module(place)):
                return _place(old, f"{place}.{name}", stacklevel=4)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds the modules that have moved, where no other finder finds anything."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_package = any(each.startswith(f"{name}.") for each in MODULES)
        return ModuleSpec(name, self, is_package=is_package) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name, f"Moved to {', '.join(MODULES[spec.name])}.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a moved module runs no code."""


sys.meta_path.append(_Finder())


def _place(old: str, new: str, stacklevel: int = 3) -> tuple[ModuleType, str]:
    """Warn; then the module that has a name now, and the name in it."""
    called = "()" if old.endswith("()") else ""
    warnings.warn(
        f"{old} is {new}{called} now; the next release removes the old name",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
    place, _, name = new.rpartition(".")
    return importlib.import_module(place), name
