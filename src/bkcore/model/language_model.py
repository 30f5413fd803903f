"""ResNet-BK: a causal language model of resolvent mixers and mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from bkcore.arguments import did_you_mean
from bkcore.errors import InputError
from bkcore.model import engine, generation, inputs, loading, saving
from bkcore.model.config import ResNetBKConfig
from bkcore.model.functions import RMSNorm
from bkcore.model.layers import ResNetBKLayer, TokenEmbedding, initialize
from bkcore.model.loss import next_token_loss, share_of_batch
from bkcore.model.meddling import known_model
from bkcore.model.quantizing import QuantizableModel
from bkcore.model.state import LayerState, StreamState
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.quantization.linear import QuantizedEmbedding
from bkcore.quantization.transaction import all_or_nothing


@dataclass
class ResNetBKOutput(ModelOutput):
    """What the language model returns.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, N, vocab_size), unless `return_logits` is False.
        cache_params: the state after the last token, if requested.
        aux_loss: scalar, in training: the weighted load-balancing loss, already part of `loss`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: StreamState | None = None
    aux_loss: Tensor | None = None


@known_model
class ResNetBKForCausalLM(QuantizableModel, GenerationMixin):
    """Causal language model: position i of the logits depends only on tokens up to i.

    It takes sequences of any length. `config.quantization` says how far it is quantized;
    `save_pretrained` and `from_pretrained` preserve that state and every bit of the logits.

    Attributes:
        receipt: what quantization did to every tensor, see `bkcore.model.receipt.of_quantized`.
            None before calibration; only its `calibration` part until the model is quantized.
    """

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _is_stateful = True  # it cannot be rolled back to an earlier token
    _no_split_modules = ["ResNetBKLayer"]  # noqa: RUF012

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        # transformers before 5.23 knows only its old name, about which newer versions warn.
        def activation_checkpointing_enable(  # type: ignore[override]
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None
        ) -> None:
            self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # whatever a subclass is called
        self.embedding: TokenEmbedding | QuantizedEmbedding = TokenEmbedding(
            config.vocab_size, config.d_model
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ResNetBKLayer(config) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.post_init()
        if config.quantization is not None:
            self._take_form(config.quantization)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache_params: StreamState | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> ResNetBKOutput | tuple[Any, ...]:
        """Next-token logits of token ids.

        Args:
            input_ids: integers in [0, vocab_size), (B, N), any B, N >= 1.
            attention_mask: (B, N), any real dtype or bool; 1 for tokens, 0 for padding. Padding
                must end its row, since every token enters the state that later ones read (not
                checked under torch.compile). The logits at padding are meaningless. Padding is
                excluded from calibration, and from the experts' token counts and load balance.
            labels: integers (B, N), usually the same ids. The model shifts them, and ignores -100,
                which padding must have. With labels, the output's `loss` is the mean negative log
                likelihood in nats, plus the weighted load-balancing loss in training.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
                `Trainer` passes it when it accumulates gradients. The load-balancing loss is then
                weighted by this call's share of the labels, so that the parts of a batch add up.
            cache_params: the state to continue from, one sequence per row; None starts afresh.
            use_cache: whether to return the state after the last token. By default it is returned
                if `cache_params` was given.
            return_logits: False computes the loss chunk by chunk and leaves `logits` None, so that
                memory does not grow with N * vocab_size. By default logits are left out only in
                training with labels if `config.chunked_loss` is set.
            return_dict: False returns a tuple without the entries that are None.
            others: options that wrappers pass to other models; must be None or False here.

        Returns:
            `ResNetBKOutput`.

        Raises:
            ShapeError, DTypeError: if `input_ids`, `attention_mask` or `labels` is not a tensor as
                above, an option is unknown or of the wrong type, or `cache_params` is the state of
                another model.
            InputError: if an id or a label is outside the vocabulary, a token follows padding,
                neither logits nor a loss is requested, the mixer keeps no state, `cache_params`
                has another number of sequences, or the state would read padding.
            LifecycleError: if the Trainer tries to train a quantized model, whose loss has no
                gradient.
        """
        flags = {"use_cache": use_cache, "return_logits": return_logits, "return_dict": return_dict}
        inputs.check_options(num_items_in_batch, cache_params, flags, others)
        input_ids = inputs.token_ids(input_ids)
        if labels is None and num_items_in_batch is not None and torch.compiler.is_compiling():
            inputs.refuse_loss_outside()
        if labels is not None:
            labels = inputs.next_labels(labels, input_ids, self.config.vocab_size)
        real = inputs.real_tokens(attention_mask, input_ids, labels)
        if self.training and num_items_in_batch is not None:  # the Trainer, not a look at the loss
            self._check_trainable()
        if return_logits is None:
            return_logits = labels is None or not (self.training and self.config.chunked_loss)
        if labels is None and not return_logits:
            raise InputError("return_logits=False without labels leaves nothing to return")
        use_cache = cache_params is not None if use_cache is None else use_cache
        if use_cache or cache_params is not None:
            inputs.check_stream(self.config, len(self.layers), input_ids, real, cache_params)
        if input_ids.shape[1] == 1:
            step = self._step(input_ids, cache_params, self._objection(labels, real))
            if step is not None:
                output = ResNetBKOutput(logits=step[0], cache_params=step[1] if use_cache else None)
                return output.to_tuple() if return_dict is False else output
        with self._computing():
            hidden, balance, state = self._hidden(input_ids, real, cache_params)
            logits = self.embedding.logits(hidden) if return_logits else None
            loss, aux_loss = self._losses(hidden, logits, balance, labels, num_items_in_batch)
        output = ResNetBKOutput(loss, logits, state if use_cache else None, aux_loss)
        return output.to_tuple() if return_dict is False else output

    def _has_graph(self) -> bool:
        """Whether a forward pass may have a gradient."""
        return torch.is_grad_enabled() and self._state is not QuantizationState.QUANTIZED

    def _objection(self, labels: Tensor | None, real: Tensor | None) -> str | None:
        """Why the engine cannot do what was asked, whatever the tokens; None if it may."""
        if not self.config.mixer_traits.streams:
            return f'the mixer "{self.config.mixer}" keeps no state'
        if labels is not None:
            return "it computes no loss; leave out the labels"
        if real is not None:
            return "it reads no padding; leave out the attention_mask"
        if self._has_graph():
            return "it computes no gradients; use torch.no_grad()"
        return None

    def _step(
        self, input_ids: Tensor, state: StreamState | None, objection: str | None = None
    ) -> tuple[Tensor, StreamState] | None:
        """Logits (B, 1, V) and the new state by the engine; None if it cannot take the tokens.

        An objection is why it must not, whatever the model.
        """
        if state is None and objection is None:
            state = self.first_state(len(input_ids))
        try:
            return engine.step(self, input_ids, state, objection)
        except IndexError as error:
            raise inputs.outside_vocabulary(input_ids, self.config.vocab_size) from error

    def _computing(self) -> AbstractContextManager[None]:
        """What a forward pass runs in, depending on the state."""
        if self._state is QuantizationState.CALIBRATING:
            return all_or_nothing(self)
        if self._state is QuantizationState.QUANTIZED:
            # Otherwise only norms and routers would get a gradient, and silently train alone.
            return torch.no_grad()
        return nullcontext()

    def iter_logits(self, input_ids: Tensor, positions: int) -> Iterator[Tensor]:
        """Yield the logits of long sequences piece by piece, so that never all are in memory.

        Args:
            input_ids: integers in [0, vocab_size), (B, N), any B, N >= 1.
            positions: rows per piece, at least 1.

        Yields:
            (at most `positions`, vocab_size): the next rows of `forward`'s logits, flattened to
            (B * N, vocab_size) and equal up to rounding.

        Raises:
            ShapeError, DTypeError: if `input_ids` is not an integer tensor (B, N).
            InputError: if an id is not in the vocabulary.
        """
        with self._computing():
            hidden, _, _ = self._hidden(inputs.token_ids(input_ids))
        for piece in hidden.flatten(0, 1).split(positions):
            with self._computing():
                logits = self.embedding.logits(piece)
            yield logits

    def _hidden(
        self,
        input_ids: Tensor,
        real: Tensor | None = None,
        state: StreamState | None = None,
    ) -> tuple[Tensor, Tensor, StreamState | None]:
        """The head's input (B, N, D), the load-balancing loss summed over layers, and the state."""
        if real is not None and self._state is QuantizationState.CALIBRATING:
            return self._hidden_by_rows(input_ids, real.sum(1).tolist())
        hidden = self.dropout(self._embedded(input_ids).to(self.final_norm.weight.dtype))
        balance = hidden.new_zeros(())
        befores: Sequence[LayerState | None] = [None] * len(self.layers)
        if state is not None:
            befores = state.layers
        afters = []
        for layer, before in zip(self.layers, befores, strict=True):
            hidden, layer_balance, after = layer(hidden, before, real)
            balance = balance + layer_balance
            afters.append(after)
        seen = input_ids.new_full(input_ids.shape[:1], input_ids.shape[1])
        seen = seen if state is None else state.seen + seen
        return self.final_norm(hidden), balance, StreamState(tuple(afters), seen)

    def _hidden_by_rows(self, input_ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, None]:
        """`_hidden` of each row's real tokens, one row at a time, so that nothing sees padding."""
        rows, balances = [], []
        for row, length in zip(input_ids, lengths, strict=True):
            hidden, balance, _ = self._hidden(row[None, :length])
            rows.append(F.pad(hidden[0], (0, 0, 0, len(row) - length)))
            balances.append(balance * length / sum(lengths))
        return torch.stack(rows), torch.stack(balances).sum(), None

    def _embedded(self, input_ids: Tensor) -> Tensor:
        try:
            embedded: Tensor = self.embedding(input_ids)
        except IndexError as error:
            raise inputs.outside_vocabulary(input_ids, self.config.vocab_size) from error
        return embedded * self.config.embedding_multiplier

    def _losses(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        balance: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, if labels are given; and in training its load-balancing part."""
        loss = aux_loss = None
        if self.training:
            aux_loss = self.config.load_balancing / len(self.layers) * balance
        if labels is not None:
            loss = self._loss(hidden, logits, labels, num_items_in_batch)
            if aux_loss is not None:
                aux_loss = aux_loss * share_of_batch(labels, num_items_in_batch)
                loss = loss + aux_loss
        return loss, aux_loss

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Mean negative log likelihood, computed from the logits if they exist."""
        if logits is None and torch.compiler.is_compiling():
            # A compiled graph cannot compute gradients in the forward pass.
            logits = self.embedding.logits(hidden)
        if logits is None:
            return next_token_loss(
                self.embedding, hidden, labels, self.config.vocab_size, num_items_in_batch
            )
        return self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )

    def _as_built(self, config: ResNetBKConfig) -> nn.Module:
        with torch.device("meta"):
            return ResNetBKForCausalLM(config)

    # ---- saving and loading ----------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the model, its quantization state and its receipt: safetensors, JSON, checksums.

        Afterwards the folder holds this model and nothing of an earlier one. If saving fails or is
        killed, it holds the old model, or something that `from_pretrained` refuses. A tokenizer in
        the folder stays and is listed in the new manifest.

        Args:
            save_directory: the folder, created if missing.
            kwargs: as in transformers: `state_dict`, `max_shard_size`, `variant`,
                `is_main_process` (only the main process writes), `save_original_format`.

        Raises:
            InputError: for arguments that cannot be honoured, such as `push_to_hub`.
            LifecycleError: during calibration, since its histograms are not saved.
            CheckpointError: if the folder cannot be written, or the result could not be loaded.
        """
        saving.save(self, super().save_pretrained, save_directory, kwargs)

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load what `save_pretrained` wrote, bit for bit.

        Only files that the manifest lists are read. Everything is checked against the
        configuration before any memory is allocated, and no code in the folder is ever run.

        Args:
            path: the folder.
            args: none.
            kwargs: as in transformers: `config`, or fields of one; `dtype`, `device_map`,
                `max_memory`, `generation_config`, `subfolder`, `variant`, `output_loading_info`.
                Options about downloads have no effect and are ignored. Also `digests`, the result
                of `bkcore.manifest.read(path)`, to load exactly those files or fail.

        Raises:
            InputError: for other arguments.
            CheckpointError: if the checkpoint is missing, truncated, altered, incomplete or
                malformed, or the folder also holds adapters.
        """
        return loading.load(cls, super().from_pretrained, path, args, kwargs)

    # ---- what transformers asks for --------------------------------------------------------

    def _get_name(self) -> str:
        # When the Trainer computes the loss itself, this name tells it to shift labels. Subclasses
        # keep it, such as the one that `fully_shard` makes.
        return ResNetBKForCausalLM.__name__

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, which is also the output head."""
        return self.embedding

    def first_state(self, batch: int = 1) -> StreamState:
        """The state of `batch` sequences before their first token.

        Raises:
            InputError: if the mixer keeps no state.
        """
        return generation.first_state(self, self.config, batch, self.final_norm.weight.device)

    def stream(
        self,
        input_ids: Tensor,
        *,
        temperature: float = 0.0,
        state: StreamState | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, StreamState]]:
        """Generate endlessly, one token at a time, in constant memory.

        Args:
            input_ids: (B, N), what to continue; B sequences of equal length.
            temperature: 0 always takes the likeliest token; otherwise logits are divided by it.
            state: the state before `input_ids`; None if they are the beginning.
            generator: random numbers for sampling.

        Yields:
            The next token of each sequence, int64 (B,), and the state before that token. To
            continue from there, pass both back: `stream(token[:, None], state=state)`.

        Raises:
            InputError: if the temperature is negative.
        """
        return generation.stream(self, self._step, input_ids, temperature, state, generator)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache_params: StreamState | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next step: first the prompt, then the last token and the state before it.

        If `generate()` gets `cache_params`, the prompt is what follows that state.

        Raises:
            InputError: if the prompts are padded: each row must end in its last token.
        """
        return generation.next_inputs(
            self.config, input_ids, attention_mask, cache_params, use_cache, is_first_iteration
        )

    def _reorder_cache(self, cache: StreamState, beam_idx: Tensor) -> StreamState:
        return cache.select(beam_idx)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is not a cache of keys and values

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)


def LanguageModel(
    vocab_size: int,
    d_model: int = 128,
    n_layers: int = 3,
    n_seq: int = 256,
    use_quantized_bk_core: bool = False,
    quantization_mode: str | QuantizationConfig | None = None,
    **options: Any,
) -> ResNetBKForCausalLM:
    """Build a `ResNetBKForCausalLM` with random weights.

    Args:
        vocab_size, d_model, n_layers, n_seq: as in `ResNetBKConfig`.
        use_quantized_bk_core: prepare for quantization; the model stays float until
            `calibrate_quantization`.
        quantization_mode: a mode or a `QuantizationConfig`; "ptq_int8" if not given.
        options: other fields of `ResNetBKConfig`.

    Raises:
        InputError: for an impossible size, an unknown option or mode, or a mode without
            `use_quantized_bk_core`.
    """
    unknown = sorted(set(options) - set(ResNetBKConfig.__dataclass_fields__))
    if unknown:
        known = sorted(ResNetBKConfig.__annotations__)
        raise InputError(
            f"ResNetBKConfig has no fields {unknown}; it has {known}{did_you_mean(unknown, known)}"
        )
    if quantization_mode is not None and not use_quantized_bk_core:
        raise InputError("quantization_mode needs use_quantized_bk_core=True")
    config = ResNetBKConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_seq=n_seq, **options
    )
    model = ResNetBKForCausalLM(config)
    if use_quantized_bk_core:
        model.configure_quantization(quantization_mode or "ptq_int8")
    return model
