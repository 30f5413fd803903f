"""What the language model takes: every argument is honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.model.config import ResNetBKConfig
from bkcore.model.loss import IGNORED
from bkcore.model.state import StreamState


def token_ids(input_ids: Any) -> Tensor:
    """Token ids as int64 (B, N), B, N >= 1.

    Raises:
        DTypeError, ShapeError: if they are no integers, or not (B, N).
    """
    ids = _integers("input_ids", input_ids)
    if ids.dim() != 2 or ids.numel() == 0:
        raise ShapeError(f"input_ids must be (B, N), B, N >= 1, not {tuple(ids.shape)}")
    return ids


def next_labels(labels: Any, ids: Tensor, vocab_size: int) -> Tensor:
    """Labels as int64 of the shape of the ids.

    Raises:
        DTypeError, ShapeError: if they are no integers, or of another shape.
        InputError: if one is neither in the vocabulary nor `IGNORED`.
    """
    labels = _integers("labels", labels)
    if labels.shape != ids.shape:
        raise ShapeError(
            f"labels must be {tuple(ids.shape)} like input_ids, not {tuple(labels.shape)}: "
            "they are shifted by the model"
        )
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise InputError(
                f"labels hold {int(wrong[0])}, but must be in [0, {vocab_size}), or {IGNORED} "
                "where there is none"
            )
    return labels


def real_tokens(mask: Any, ids: Tensor, labels: Tensor | None) -> Tensor | None:
    """Where the ids are tokens and not padding, bool (B, N); None if they are all tokens.

    A graph cannot look at values: compiled, the mask is taken as it is, and never None.

    Raises:
        DTypeError, ShapeError: if the mask is not of real numbers or bool, or not of the ids'
            shape.
        InputError: if it holds other numbers than 0 and 1, a token follows padding, a row is
            nothing but padding, or padding has labels.
    """
    if mask is None:
        return None
    mask = _mask_like(mask, ids)
    real = mask != 0
    if torch.compiler.is_compiling():
        return real
    padding = ~real
    labelled = padding if labels is None else padding & (labels != IGNORED)
    # One look, for which a GPU is waited for once.
    looks = [mask != real, padding, real[:, 1:] & padding[:, :-1], padding[:, 0], labelled]
    odd, padded, split, empty, labelled_padding = torch.stack([x.any() for x in looks]).tolist()
    if odd:
        raise InputError(
            "attention_mask must hold 1 for tokens, 0 for padding, and nothing else; masks that "
            "are added to scores do not fit a model without attention"
        )
    if not padded:
        return None
    if split:
        raise InputError(
            "a token follows padding in attention_mask, and padding enters the state of what "
            "follows; pad on the right (tokenizer.padding_side = 'right')"
        )
    if empty:
        raise InputError("a row of attention_mask is nothing but padding; leave it out")
    if labels is not None and labelled_padding:
        raise InputError(
            f"there are labels where attention_mask has padding; make them {IGNORED}, which the "
            "loss leaves out"
        )
    return real


def _mask_like(mask: Any, ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_complex():
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DTypeError(
            f"attention_mask must be a tensor, 1 for tokens and 0 for padding, not {given}"
        )
    if mask.shape != ids.shape:
        raise ShapeError(
            f"attention_mask must be {tuple(ids.shape)} like input_ids, not {tuple(mask.shape)}"
        )
    return mask.to(ids.device)


def calibration_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The ids of a batch and where they are tokens, as `token_ids` and `real_tokens` give them.

    Args:
        batch: a tensor of ids, or a mapping with `input_ids`, maybe `attention_mask`, and whatever
            tokenizers and collators add, which does not matter to calibration.

    Raises:
        InputError: if it is something else; or as they do.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise InputError(
            "a batch must be a tensor of token ids, or a mapping with input_ids and "
            f"attention_mask, not a {type(batch).__name__}"
        )
    if "input_ids" not in batch:
        raise InputError(
            f"a batch must have input_ids; this one has {', '.join(map(str, batch)) or 'nothing'}"
        )
    ids = token_ids(batch["input_ids"])
    return ids, real_tokens(batch.get("attention_mask"), ids, None)


# What raises while a graph is traced would be run again without one.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def refuse_loss_outside() -> None:
    """Raise `InputError`: the Trainer smooths labels of a compiled model without shifting them.

    It knows by a model's name that they are to be shifted, and a compiled one has another.
    """
    raise InputError(
        "the Trainer would not shift the labels of a compiled model where it computes the loss "
        "itself: leave out torch_compile, or label_smoothing_factor and compute_loss_func"
    )


def check_options(
    num_items_in_batch: Any, cache_params: Any, flags: dict[str, Any], others: dict[str, Any]
) -> None:
    """Raise `DTypeError` or `InputError` if an option of `forward` is of another kind.

    Args:
        num_items_in_batch, cache_params: the options of these names.
        flags: what is True, False or None, by name.
        others: what the model does not have; to be refused unless it is None or False.
    """
    for name, value in others.items():
        if not (value is None or value is False):
            raise DTypeError(f"the model takes no {name}; see ResNetBKForCausalLM.forward")
    for name, value in flags.items():
        if not (value is None or isinstance(value, bool)):
            raise DTypeError(f"{name} must be True, False or None, not {value!r}")
    if not (cache_params is None or isinstance(cache_params, StreamState)):
        raise DTypeError(
            f"cache_params must be a StreamState, not {type(cache_params).__name__}: there are no "
            "keys and values to keep"
        )
    count = num_items_in_batch
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.is_complex() or count.dtype == torch.bool:
            raise InputError(
                f"num_items_in_batch must be one number, not {count.dtype} {tuple(count.shape)}"
            )
    elif count is not None and (isinstance(count, bool) or not isinstance(count, int | float)):
        raise DTypeError(f"num_items_in_batch must be a number, not {count!r}")
    elif count is not None and not count > 0:
        raise InputError(f"num_items_in_batch must be positive, not {count!r}")


def check_streams(config: ResNetBKConfig) -> None:
    """Raise `InputError` unless a model keeps a state."""
    if not config.mixer_traits.streams:
        raise InputError(f'a model with mixer="{config.mixer}" keeps no state')


def check_stream(
    config: ResNetBKConfig,
    layers: int,
    input_ids: Tensor,
    real: Tensor | None,
    state: StreamState | None,
) -> None:
    """Check that a model with so many layers can go on from a state, or give the one behind ids.

    Raises:
        ShapeError: if the state is that of another model.
        InputError: if the model keeps none, it is of other sequences, or padding would be read.
    """
    check_streams(config)
    if real is not None and not bool(real.all()):  # a compiled graph ends here, to look
        raise InputError(
            "a state would have read the padding too; read texts of different lengths one "
            "after the other, and put their states together with StreamState.batch()"
        )
    if state is not None and len(state) != len(input_ids):
        raise InputError(f"cache_params has {len(state)} sequences, input_ids {len(input_ids)}")
    if state is not None and len(state.layers) != layers:
        raise ShapeError(
            f"cache_params has {len(state.layers)} layers, the model {layers}: it is "
            "the state of another model"
        )


def _integers(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} must be a tensor of integers, not {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DTypeError(f"{name} must be integers, not {x.dtype}")
    return x.long()
