"""Checks of the language model's arguments: each is honoured, or refused by name."""

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
        DTypeError, ShapeError: if they are not integers, or not (B, N).
    """
    ids = _integers("input_ids", input_ids)
    if ids.dim() != 2 or ids.numel() == 0:
        raise ShapeError(f"input_ids must be (B, N), B, N >= 1, not {tuple(ids.shape)}")
    return ids


def outside_vocabulary(ids: Tensor, vocab_size: int) -> InputError:
    """The error for token ids that a model of this vocabulary does not have."""
    return InputError(
        f"input_ids go from {int(ids.min())} to {int(ids.max())}, but must be in "
        f"[0, {vocab_size}); are they from another model's tokenizer?"
    )


def next_labels(labels: Any, ids: Tensor, vocab_size: int) -> Tensor:
    """Labels as int64 of the shape of the ids.

    Raises:
        DTypeError, ShapeError: if they are not integers, or have another shape.
        InputError: if one is neither in the vocabulary nor `IGNORED`.
    """
    labels = _integers("labels", labels)
    if labels.shape != ids.shape:
        raise ShapeError(
            f"labels must be {tuple(ids.shape)} like input_ids, not {tuple(labels.shape)}; "
            "the model shifts them itself"
        )
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise InputError(
                f"labels hold {int(wrong[0])}, but must be in [0, {vocab_size}), or {IGNORED} "
                "at positions without a label"
            )
    return labels


def real_tokens(mask: Any, ids: Tensor, labels: Tensor | None) -> Tensor | None:
    """Where the ids are tokens and not padding, bool (B, N); None if they are all tokens.

    A compiled graph cannot look at values: there the mask is used unchecked, and a mask never
    becomes None.

    Raises:
        DTypeError, ShapeError: if the mask is neither real nor bool, or its shape is not that of
            the ids.
        InputError: if it holds anything but 0 and 1, a token follows padding, a row is all
            padding, or padding has labels.
    """
    if mask is None:
        return None
    mask = _mask_like(mask, ids)
    real = mask != 0
    if torch.compiler.is_compiling():
        return real
    padding = ~real
    labelled = padding if labels is None else padding & (labels != IGNORED)
    # One transfer of all answers, so that a GPU synchronizes only once.
    looks = [mask != real, padding, real[:, 1:] & padding[:, :-1], padding[:, 0], labelled]
    odd, padded, split, empty, labelled_padding = torch.stack([x.any() for x in looks]).tolist()
    if odd:
        raise InputError(
            "attention_mask must hold only 1 for tokens and 0 for padding; this model has no "
            "attention scores that a mask could be added to"
        )
    if not padded:
        return None
    if split:
        raise InputError(
            "a token follows padding in attention_mask, and would read a state that has seen the "
            "padding; pad on the right (tokenizer.padding_side = 'right')"
        )
    if empty:
        raise InputError("a row of attention_mask is all padding; leave the row out")
    if labels is not None and labelled_padding:
        raise InputError(
            f"labels must be {IGNORED} where attention_mask has padding, so that the loss leaves "
            "them out"
        )
    return real


def _mask_like(mask: Any, ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_complex():
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DTypeError(
            f"attention_mask must be a tensor with 1 for tokens and 0 for padding, not {given}"
        )
    if mask.shape != ids.shape:
        raise ShapeError(
            f"attention_mask must be {tuple(ids.shape)} like input_ids, not {tuple(mask.shape)}"
        )
    return mask.to(ids.device)


def calibration_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The ids of a batch, as `token_ids` returns them, and its mask, as `real_tokens` does.

    Args:
        batch: a tensor of ids, or a mapping with `input_ids` and perhaps `attention_mask`. What
            else tokenizers and collators add is ignored.

    Raises:
        InputError: if the batch is something else.
        DTypeError, ShapeError, InputError: as `token_ids` and `real_tokens`.
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


# An exception while tracing would make torch.compile run the code again eagerly.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def refuse_loss_outside() -> None:
    """Raise `InputError`: the Trainer would not shift the labels of a compiled model.

    When the Trainer computes the loss itself, it decides by the model's class name whether to shift
    labels, and a compiled model has another name.
    """
    raise InputError(
        "the Trainer does not shift the labels of a compiled model when it computes the loss "
        "itself; leave out torch_compile, or label_smoothing_factor and compute_loss_func"
    )


def check_options(
    num_items_in_batch: Any, cache_params: Any, flags: dict[str, Any], others: dict[str, Any]
) -> None:
    """Raise `DTypeError` or `InputError` if an option of `forward` is not valid.

    Args:
        num_items_in_batch, cache_params: the options of these names.
        flags: by name, the options that must be True, False or None.
        others: options that the model does not have, refused unless None or False.
    """
    for name, value in others.items():
        if not (value is None or value is False):
            raise DTypeError(f"the model takes no {name}; see ResNetBKForCausalLM.forward")
    for name, value in flags.items():
        if not (value is None or isinstance(value, bool)):
            raise DTypeError(f"{name} must be True, False or None, not {value!r}")
    if not (cache_params is None or isinstance(cache_params, StreamState)):
        raise DTypeError(
            f"cache_params must be a StreamState, not {type(cache_params).__name__}; this model "
            "keeps a recurrent state, not keys and values"
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
    """Check that a model can continue from `state`, and that it has a state after `input_ids`.

    Args:
        config: of the model.
        layers: how many the model has.
        input_ids: (B, N), what it is about to read.
        real: from `real_tokens`.
        state: to continue from, or None.

    Raises:
        ShapeError: if the state belongs to another model.
        InputError: if the model keeps no state, the state has another number of sequences, or the
            state would read padding.
    """
    check_streams(config)
    if real is not None and not bool(real.all()):  # a compiled graph ends here, to look
        raise InputError(
            "the state would include the padding; read texts of different lengths one at a time "
            "and join their states with StreamState.batch()"
        )
    if state is not None and len(state) != len(input_ids):
        raise InputError(
            f"cache_params has {len(state)} sequences, but input_ids has {len(input_ids)}"
        )
    if state is not None and len(state.layers) != layers:
        raise ShapeError(
            f"cache_params has {len(state.layers)} layers, but the model has {layers}; it is the "
            "state of another model"
        )


def _integers(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} must be a tensor of integers, not {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DTypeError(f"{name} must be integers, not {x.dtype}")
    return x.long()
