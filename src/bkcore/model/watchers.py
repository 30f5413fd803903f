"""What of PyTorch may come between the call of a module and its result: modes, transforms, hooks.

PyTorch has no public names for most of it. The private names that the engine needs are all in this
file; a PyTorch that lacks one of them turns the engine off, and `watcher` says so.
"""

from __future__ import annotations

import torch

try:
    from torch._C import (  # which trace, dispatch mode and function mode are active
        _get_function_stack_at,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import peek_interpreter_stack  # which transform of torch.func
    from torch.autograd import forward_ad  # its level of dual numbers, -1 outside
    from torch.nn.modules.module import _has_any_global_hook  # hooks of all modules
    from torch.utils._device import DeviceContext  # the mode of a default device

    _missing = "" if hasattr(forward_ad, "_current_level") else "forward_ad._current_level"
except ImportError as error:
    _missing = str(error)


def watcher() -> str | None:
    """What of PyTorch sees or changes the operations of all modules now; None if nothing does.

    The mode of `torch.set_default_device` does not count: modules name the devices of their
    tensors.
    """
    if _missing:
        return f"one cannot ask PyTorch {torch.__version__} what watches a model ({_missing})"
    if torch.compiler.is_compiling():
        return "PyTorch compiles the model"
    if _get_tracing_state() is not None:
        return "PyTorch traces the model"
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation is at work"
    modes = map(_get_function_stack_at, range(_len_torch_function_stack()))
    if _len_torch_dispatch_stack() or not all(type(mode) is DeviceContext for mode in modes):
        return "a mode of PyTorch watches the model"
    if _has_any_global_hook():
        return "a hook is registered for all modules"
    return None
