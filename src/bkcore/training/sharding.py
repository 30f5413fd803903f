"""Models too large for one device: shard parameters, gradients and optimizer among processes.

This is PyTorch's FSDP2. It is applied here rather than by accelerate, whose FSDP plugin works only
on accelerators and is silently ignored on CPUs.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from bkcore.errors import CheckpointError, InputError


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been applied."""
    return isinstance(model, FSDPModule)


def shard(model: PreTrainedModel) -> None:
    """Shard the parameters of a model among all processes, in place.

    Each layer (a module whose class is in the model's `_no_split_modules`) is gathered while it
    computes and freed afterwards; the rest stays gathered for the whole pass. Every process must
    call this on equal weights before creating an optimizer, and must then take part in every pass.
    `train` accepts the model without `output`; `save_whole` saves it.

    Args:
        model: with floating-point parameters on one kind of device.

    Raises:
        InputError: without a process group (`torchrun`), or if the model names no layers.
    """
    if not dist.is_initialized():
        raise InputError(
            "shard needs several processes; start them with torchrun, and call "
            "torch.distributed.init_process_group() before"
        )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"{type(model).__name__} names no layers in _no_split_modules")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """Save a sharded model as `save_pretrained` saves a whole one; all processes call this.

    The weights are gathered to the memory of the first process, which writes.

    Raises:
        InputError: if the model is not sharded.
        CheckpointError: if the folder cannot be written.
    """
    if not is_sharded(model):
        raise InputError("the model is not sharded; save it with model.save_pretrained()")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            model.save_pretrained(folder, state_dict=weights)
        except Exception as error:
            failure = [str(error)]
            raise
        finally:  # the others wait for this message
            dist.broadcast_object_list(failure, src=0)
        return
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(f"the first process could not save the model: {failure[0]}")
