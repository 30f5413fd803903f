"""ResNet-BK: a causal language model of resolvent mixers and mixtures of experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from bkcore.errors import CheckpointError, InputError, LifecycleError, ShapeError
from bkcore.model import inputs, loading, quantized, receipt, saving
from bkcore.model.certificate import certify
from bkcore.model.config import ResNetBKConfig, form_of
from bkcore.model.loss import IGNORED, next_token_loss
from bkcore.model.mixer import MIXERS, ConvolutionMixer, Features, GreenMixer, ResolventMixer
from bkcore.model.moe import MixtureOfExperts, uncounted
from bkcore.model.state import LayerState, StreamState
from bkcore.model.structure import check_structure
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationLifecycle, QuantizationState
from bkcore.quantization.linear import QuantizedEmbedding
from bkcore.quantization.transaction import all_or_nothing

_SAMPLE = 128
"""Tokens of the calibration data that the receipt certifies the cores on."""

_REPLACING = {"start_calibration", "apply_ptq", "enable_qat", "convert"}
"""Steps that replace layers, and the first on the way there, so that no work is done in vain."""


class TokenEmbedding(nn.Embedding):
    """Token embedding (V, D) whose rows also are the output head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.weight)


class ResNetBKLayer(GradientCheckpointingLayer):
    """Mixer and experts, each behind a norm and around a residual.

    With activation checkpointing, training keeps the layer's input only and computes the rest
    again in the backward pass.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.experts_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.experts = MixtureOfExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, state: LayerState | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        """hidden (B, N, D), which goes on where `state` ended; bool (B, N), where it is no padding.

        Returns:
            (B, N, D), the load-balancing loss of this layer, and the state behind `hidden`, which
            mixers other than `ResolventMixer` do not have.
        """
        mixed, state = self.mixer(self.mixer_norm(hidden), state)
        hidden = hidden + self.dropout(mixed)
        update, balance = self.experts(self.experts_norm(hidden), real)
        return hidden + self.dropout(update), balance, state


@dataclass
class ResNetBKOutput(ModelOutput):
    """What the language model returns.

    Attributes:
        loss: scalar, if there are labels.
        logits: (B, N, vocab_size), unless `return_logits` is False.
        cache_params: the state after the last token, if it is asked for.
        aux_loss: scalar, while training: the weighted load-balancing loss, which `loss` has in it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: StreamState | None = None
    aux_loss: Tensor | None = None


class ResNetBKForCausalLM(QuantizationLifecycle, PreTrainedModel, GenerationMixin):
    """Causal language model; position i of the logits depends on tokens up to i only.

    It takes any sequence length. `config.quantization` says how far it is quantized;
    `save_pretrained` and `from_pretrained` keep that state and every bit of the logits.

    Attributes:
        receipt: what was done to every tensor, see `bkcore.model.receipt.of_quantized`; after
            calibration only `calibration`, and None before.
    """

    config_class = ResNetBKConfig
    config: ResNetBKConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _is_stateful = True  # it cannot be rolled back to an earlier token
    _no_split_modules = ["ResNetBKLayer"]  # noqa: RUF012

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # whatever a subclass is called
        self.receipt: receipt.Receipt | None = None
        self._certified_ids: Tensor | None = None  # some of the calibration data
        self.embedding: TokenEmbedding | QuantizedEmbedding = TokenEmbedding(
            config.vocab_size, config.d_model
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ResNetBKLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
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
            attention_mask: (B, N), any real dtype or bool, 1 for tokens and 0 for padding, which
                must come last in its row: what comes first enters the state of all that follows
                (under torch.compile that is not checked). The logits of padding mean nothing; it
                takes no part in calibration, in the counts of the experts' tokens and in their
                balance.
            labels: integers (B, N), usually the same ids; they are shifted here, -100 is ignored,
                which padding has to have. With labels the output's `loss` is the mean negative log
                likelihood in nats, plus the weighted load-balancing loss while training.
            num_items_in_batch: divide the summed loss by this instead of the number of labels;
                given by `Trainer` when it accumulates gradients. The load-balancing loss then
                weighs as much as the labels that are here, so that the parts of a batch add up.
            cache_params: the state to go on from, one sequence a row; None begins anew.
            use_cache: whether to return the state after the last token; if not given, it is if
                there was one to go on from.
            return_logits: False computes the loss a chunk of positions at a time and leaves
                `logits` None, so that memory does not grow as N * vocab_size. If not given, they
                are left out while training with labels if `config.chunked_loss` says so.
            return_dict: False gives a tuple, without what is None.
            others: what wrappers ask other models for; None or False, for it is not here.

        Returns:
            `ResNetBKOutput`.

        Raises:
            ShapeError, DTypeError: if `input_ids`, `attention_mask` or `labels` is not a tensor as
                above, an option is of another type or not known, or `cache_params` is the state of
                another model.
            InputError: if an id or a label is not in the vocabulary, a token follows padding,
                neither logits nor a loss are wanted, or a state is asked for that does not fit, is
                not there, or would have read padding.
            LifecycleError: if the Trainer is to train a quantized model: its loss has no gradient.
        """
        flags = {
            "use_cache": use_cache,
            "return_logits": return_logits,
            "return_dict": return_dict,
        }
        inputs.check_options(num_items_in_batch, cache_params, flags, others)
        input_ids = inputs.token_ids(input_ids)
        if labels is None and num_items_in_batch is not None and torch.compiler.is_compiling():
            inputs.refuse_loss_outside()
        if labels is not None:
            labels = inputs.next_labels(labels, input_ids, self.config.vocab_size)
        real = inputs.real_tokens(attention_mask, input_ids, labels)
        if self.training and num_items_in_batch is not None:  # the Trainer; a loss may be looked at
            self._check_trainable()
        if return_logits is None:
            return_logits = labels is None or not (self.training and self.config.chunked_loss)
        if labels is None and not return_logits:
            raise InputError("return_logits=False leaves nothing to return without labels")
        use_cache = cache_params is not None if use_cache is None else use_cache
        if use_cache or cache_params is not None:
            self._check_stream(input_ids, real, cache_params)
        observing = self._state is QuantizationState.CALIBRATING
        with all_or_nothing(self) if observing else nullcontext():
            hidden, balance, state = self._hidden(input_ids, real, cache_params)
            logits = self.embedding.logits(hidden) if return_logits else None
            loss = aux_loss = None
            if self.training:
                aux_loss = self.config.load_balancing / len(self.layers) * balance
            if labels is not None:
                loss = self._loss(hidden, logits, labels, num_items_in_batch)
                if aux_loss is not None:
                    aux_loss = aux_loss * _part(labels, num_items_in_batch)
                    loss = loss + aux_loss
        output = ResNetBKOutput(loss, logits, state if use_cache else None, aux_loss)
        return output.to_tuple() if return_dict is False else output

    def iter_logits(self, input_ids: Tensor, positions: int) -> Iterator[Tensor]:
        """The logits of long sequences a piece at a time, in bounded memory.

        Args:
            input_ids: integers in [0, vocab_size), (B, N), any B, N >= 1.
            positions: rows of a piece, at least 1.

        Yields:
            (at most `positions`, vocab_size): the logits of `forward`, to rounding, flattened to
            (B * N, vocab_size).

        Raises:
            ShapeError, DTypeError: if `input_ids` is not an integer tensor (B, N).
            InputError: if an id is not in the vocabulary.
        """
        hidden, _, _ = self._hidden(inputs.token_ids(input_ids))
        for piece in hidden.flatten(0, 1).split(positions):
            yield self.embedding.logits(piece)

    def _hidden(
        self,
        input_ids: Tensor,
        real: Tensor | None = None,
        state: StreamState | None = None,
    ) -> tuple[Tensor, Tensor, StreamState | None]:
        """What the head takes, (B, N, D); the load-balancing loss summed over layers; the state."""
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
        hidden = self.final_norm(hidden)
        if self._state is QuantizationState.QUANTIZED:
            # Only norms and routers would get a gradient, and train alone without a word.
            hidden, balance = hidden.detach(), balance.detach()
        return hidden, balance, StreamState(tuple(afters), seen)

    def _hidden_by_rows(self, input_ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, None]:
        """`_hidden` of the first tokens of each row alone, so that nothing observes padding."""
        rows, balances = [], []
        for row, length in zip(input_ids, lengths, strict=True):
            hidden, balance, _ = self._hidden(row[None, :length])
            rows.append(F.pad(hidden[0], (0, 0, 0, len(row) - length)))
            balances.append(balance * length / sum(lengths))
        return torch.stack(rows), torch.stack(balances).sum(), None

    def _check_trainable(self) -> None:
        if self._state is QuantizationState.QUANTIZED and torch.is_grad_enabled():
            raise LifecycleError(
                "the model is quantized: its weights are codes, which cannot be trained; train the "
                "float model, or in a QAT mode before convert()"
            )

    def _embedded(self, input_ids: Tensor) -> Tensor:
        try:
            embedded: Tensor = self.embedding(input_ids)
        except IndexError as error:
            raise InputError(
                f"input_ids go from {int(input_ids.min())} to {int(input_ids.max())}, but must be "
                f"in [0, {self.config.vocab_size}): were they made by another model's tokenizer?"
            ) from error
        return embedded * self.config.embedding_multiplier

    def _check_stream(
        self, input_ids: Tensor, real: Tensor | None, state: StreamState | None
    ) -> None:
        if self.config.mixer != "resolvent":
            raise InputError(f'a model with mixer="{self.config.mixer}" keeps no state')
        if real is not None and not bool(real.all()):  # a compiled graph ends here, to look
            raise InputError(
                "a state would have read the padding too; read texts of different lengths one "
                "after the other, and put their states together with StreamState.batch()"
            )
        if state is not None and len(state) != len(input_ids):
            raise InputError(f"cache_params has {len(state)} sequences, input_ids {len(input_ids)}")
        if state is not None and len(state.layers) != len(self.layers):
            raise ShapeError(
                f"cache_params has {len(state.layers)} layers, the model {len(self.layers)}: it is "
                "the state of another model"
            )

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Mean negative log likelihood, from the logits if they are there already."""
        if logits is None and torch.compiler.is_compiling():
            # A graph cannot hold gradients that are made in the forward pass.
            logits = self.embedding.logits(hidden)
        if logits is None:
            return next_token_loss(
                self.embedding, hidden, labels, self.config.vocab_size, num_items_in_batch
            )
        return self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )

    # ---- quantization ----------------------------------------------------------------------

    def configure_quantization(self, config: QuantizationConfig | str) -> None:
        """Choose how a float model is going to be quantized.

        Raises:
            InputError: for an unknown mode.
            LifecycleError: if the model is past the float state, or its mixer cannot be quantized.
        """
        self._require("configure_quantization", {QuantizationState.FLOAT})
        if self.config.mixer != "resolvent":
            raise LifecycleError(
                f'a model with mixer="{self.config.mixer}" is there to compare with and cannot be '
                'quantized; build one with mixer="resolvent"'
            )
        config = QuantizationConfig(config) if isinstance(config, str) else config
        quantized.check_tensor_bits(self, config)
        with self._whole_or_not():
            self._quant_config = config
            self._set_state(QuantizationState.FLOAT)

    def assign_bits(self, tensor_bits: dict[str, int]) -> None:
        """Choose the bits of single weights, before or after calibration.

        Args:
            tensor_bits: as in `QuantizationConfig`; it takes the place of the one before.

        Raises:
            InputError: for an unknown name, or bits that a weight cannot have.
            CalibrationError: after calibration, for INT4 weights that were not calibrated as such.
            LifecycleError: if the weights are quantized already, or the model has no mode.
        """
        config = self._require_config("assign_bits")
        self._require("assign_bits", {QuantizationState.FLOAT, QuantizationState.CALIBRATED})
        config = replace(config, tensor_bits=dict(tensor_bits))
        quantized.check_tensor_bits(self, config)
        with self._whole_or_not():
            if self._state is QuantizationState.CALIBRATED:
                quantized.keep_moments(self, config)
            self._quant_config = config
            self._set_state(self._state)

    def calibrate_quantization(self, batches: Iterable[Tensor | Mapping[str, Any]]) -> None:
        """Calibrate on token ids, then quantize (PTQ modes) or make ready to train (QAT modes).

        Args:
            batches: token ids (B, N), or mappings with `input_ids` and, if there is padding,
                `attention_mask`, both as in `forward`, such as a tokenizer gives with
                return_tensors="pt". Padding is not observed. Nothing else is looked at.

        Raises:
            LifecycleError: without a quantization mode, past the calibrated state, or if something
                was put between the model and its layers, see `bkcore.model.structure`.
            CalibrationError: if there is no batch, or an activation or a weight is not finite.
            InputError: if a batch is something else, or as in `forward`.
            Whatever is raised, the model is then as it was before.
        """
        config = self._require_config("calibrate_quantization")
        if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
            raise InputError(
                "calibrate_quantization takes an iterable of batches, not a "
                f"{type(batches).__name__}; for one batch of token ids give [ids]"
            )
        was_training = self.training
        with self._whole_or_not():
            self.start_calibration()
            self.eval()
            with torch.no_grad():
                for batch in batches:
                    ids, real = inputs.calibration_batch(batch)
                    self._hidden(ids, real)
                    first = ids[0] if real is None else ids[0, real[0]]
                    self._certified_ids = first[None, :_SAMPLE].clone()
            self.end_calibration()
            self.train(was_training)
            if config.is_qat:
                self.enable_qat()
            else:
                self.apply_ptq()

    def estimate_model_size(self) -> dict[str, Any]:
        """Bytes of the parameters and buffers.

        Returns:
            `fp32_bytes`, `quantized_bytes` (once quantized, at any state), `current_bytes` (now),
            `compression_ratio` (the first over the second) and `bits` (of the core).

        Raises:
            LifecycleError: without a quantization mode.
        """
        config = self._require_config("estimate_model_size")
        plain = copy.deepcopy(self.config)
        plain.quantization = None
        with torch.device("meta"):
            float_model = ResNetBKForCausalLM(plain)
        own_bytes = sum(  # what a subclass adds, which stays as it is
            tensor.numel() * tensor.element_size()
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]
            if not hasattr(float_model, name.partition(".")[0])
        )
        fp32_bytes = quantized.storage_bytes(float_model) + own_bytes
        quantized.attach_core_quantizers(float_model, config, learnable=False)
        quantized.make_empty(float_model, config, trainable=False)
        quantized_bytes = quantized.storage_bytes(float_model) + own_bytes
        return {
            "fp32_bytes": fp32_bytes,
            "quantized_bytes": quantized_bytes,
            "current_bytes": quantized.storage_bytes(self),
            "compression_ratio": fp32_bytes / quantized_bytes,
            "bits": config.bits,
        }

    def _take_form(self, fields: dict[str, Any]) -> None:
        """Give a freshly built float model the modules of the state that `fields` names."""
        config, state = form_of(fields)
        self._quant_config = config
        quantized.check_tensor_bits(self, config)
        if state is not QuantizationState.FLOAT:
            learnable = config.is_qat and state is not QuantizationState.QUANTIZED
            quantized.attach_core_quantizers(self, config, learnable=learnable)
        if state is QuantizationState.CALIBRATED:
            quantized.attach_moments(self, config)
        if state in (QuantizationState.TRAINING, QuantizationState.QUANTIZED):
            quantized.make_empty(self, config, trainable=state is QuantizationState.TRAINING)
            quantized.set_phase(self, "quantize")
        self._set_state(state)

    def _require(self, step: str, allowed: set[QuantizationState]) -> None:
        super()._require(step, allowed)
        if step in _REPLACING:
            with torch.device("meta"):
                check_structure(self, ResNetBKForCausalLM(copy.deepcopy(self.config)), step)

    @contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """Put the model back as it was, its configuration too, if the block raises."""
        before = self.config.quantization
        try:
            with all_or_nothing(self):
                yield
        except BaseException:
            self.config.quantization = before
            raise

    def _set_state(self, state: QuantizationState) -> None:
        super()._set_state(state)
        assert self._quant_config is not None
        self.config.quantization = {**self._quant_config.to_dict(), "state": state.value}

    def _on_start_calibration(self) -> None:
        config = self._require_config("start_calibration")
        quantized.attach_core_quantizers(self, config, learnable=config.is_qat)
        for layer, moments in quantized.attach_moments(self, config):
            moments.watch(layer)
        quantized.set_phase(self, "observe")
        receipt.start_counting(self)
        self._certified_ids = None

    def _on_end_calibration(self) -> None:
        for quantizers in quantized.core_quantizers(self):
            for quantizer in quantizers.parts():
                quantizer.end_calibration()
        for moments in quantized.input_moments(self):
            moments.unwatch()
            moments.merge_processes()
        quantized.set_phase(self, "idle")
        self.receipt = receipt.of_calibration(self)

    def _on_enable_qat(self) -> None:
        quantized.make_trainable(self, self._require_config("enable_qat"))
        quantized.set_phase(self, "quantize")

    def _on_quantize(self) -> None:
        config = self._require_config("apply_ptq")
        before = receipt.float_weights(self)
        quantized.make_packed(self, config)
        for quantizers in quantized.core_quantizers(self):
            for quantizer in quantizers.parts():
                quantizer.freeze()
        quantized.set_phase(self, "quantize")
        self.receipt = receipt.of_quantized(self, config, before, self.receipt or {})
        if self._certified_ids is not None:
            was_training = self.training
            with uncounted(self.eval()):
                self.receipt |= receipt.of_cores(certify(self, self._certified_ids))
            self.train(was_training)

    # ---- transformers ----------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the model, its quantization state and its receipt: safetensors, JSON, checksums.

        The folder holds this model afterwards and nothing of one that was there before, or, if
        saving fails or is killed, the old one or what `from_pretrained` refuses. A tokenizer in it
        stays and is listed with the model.

        Args:
            save_directory: the folder; made if it is not there.
            kwargs: of transformers: `state_dict`, `max_shard_size`, `variant`, `is_main_process`
                (only the main process writes), `save_original_format`.

        Raises:
            InputError: for arguments that cannot be honoured, such as `push_to_hub`.
            LifecycleError: during calibration, whose histograms are not saved.
            CheckpointError: if the folder cannot be written, or what is saved could not be loaded
                again.
        """
        saving.check_arguments(kwargs)
        if getattr(self, "_hf_peft_config_loaded", False):
            # Adapters alone, in files of PEFT's, which model.load_adapter() reads.
            with saving.failing_in_words(Path(save_directory)):
                super().save_pretrained(save_directory, **kwargs)
            return
        if self._state is QuantizationState.CALIBRATING:
            raise LifecycleError("cannot save during calibration: call end_calibration() first")
        with saving.place(Path(save_directory), kwargs) as staged:
            with saving.failing_in_words(Path(save_directory)):
                super().save_pretrained(staged, **kwargs)
            if kwargs.get("is_main_process", True):
                if self.receipt is not None:
                    receipt.write(self.receipt, staged)
                loading.check_saved(type(self), staged, Path(save_directory))

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load what `save_pretrained` wrote, bit for bit.

        Only files that the manifest lists are read. Everything is compared with the configuration
        before it takes memory, and nothing in the folder is ever run.

        Args:
            path: the folder.
            args: none.
            kwargs: of transformers: `config`, or fields of one; `dtype`, `device_map`,
                `max_memory`, `generation_config`, `subfolder`, `variant`, `output_loading_info`.
                Those about downloads mean nothing for a folder, and are left aside. And `digests`,
                what `bkcore.manifest.read(path)` gave, to load exactly that or nothing.

        Raises:
            InputError: for other arguments.
            CheckpointError: if the checkpoint is missing, truncated, altered, incomplete or
                malformed, or its folder holds adapters, too.
        """
        request = loading.Request.of(path, args, kwargs)
        with loading.opened(request, cls) as source:
            loaded: Any = super().from_pretrained(
                None,
                config=source.config,
                state_dict=source.tensors,
                dtype=request.dtype or source.dtype,
                output_loading_info=True,
                **request.passed_on,
            )
        model, info = loaded
        wrong = {name: keys for name, keys in info.items() if keys}
        if wrong:
            raise CheckpointError(f"the checkpoint {path} does not fit its configuration: {wrong}")
        model.name_or_path = model.config.name_or_path = str(request.folder)
        model.receipt = source.receipt
        generation = request.generation or source.generation
        if generation is not None:
            model.generation_config = copy.deepcopy(generation)
        return (model, info) if request.wants_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, for a model of the same quantization state.

        Raises:
            CheckpointError: if the state dict is of another state, whose tensors differ.
        """
        if _quantized_keys(state_dict) != _quantized_keys(self.state_dict()):
            raise CheckpointError(
                "the state dict is of a model in another quantization state than this one, which "
                f"is {self._state.value}; save_pretrained() and from_pretrained() keep the state"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _get_name(self) -> str:
        # The Trainer asks for it to know whose labels to shift where it computes a loss of its own:
        # the same for subclasses, one of which `fully_shard` makes.
        return ResNetBKForCausalLM.__name__

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, which also is the output head."""
        return self.embedding

    def first_state(self, batch: int = 1) -> StreamState:
        """The state of `batch` sequences that nothing has been read of.

        Raises:
            InputError: for a mixer that keeps none.
        """
        if self.config.mixer != "resolvent":
            raise InputError(f'a model with mixer="{self.config.mixer}" keeps no state')
        mixers = (module for module in self.modules() if isinstance(module, ResolventMixer))
        layers = tuple(mixer.first_state(batch) for mixer in mixers)
        device = self.final_norm.weight.device
        return StreamState(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        *,
        temperature: float = 0.0,
        state: StreamState | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, StreamState]]:
        """Generate without end, a token at a time, in constant memory.

        Args:
            input_ids: (B, N), what to continue; B sequences of one length.
            temperature: 0 takes the likeliest token each time; else what logits are divided by.
            state: what went before `input_ids`, if anything did.
            generator: of the sampling.

        Yields:
            The next token of each sequence, int64 (B,), and the state before it: give both back,
            `stream(token[:, None], state=state)`, to go on from there.

        Raises:
            InputError: if the temperature is negative.
        """
        if not temperature >= 0:
            raise InputError(f"temperature must be at least 0, not {temperature}")
        while True:
            output = self(input_ids, cache_params=state, use_cache=True)
            logits, state = output.logits[:, -1].float(), output.cache_params
            if temperature:
                chances = (logits / temperature).softmax(-1)
                token = chances.multinomial(1, generator=generator).squeeze(1)
            else:
                token = logits.argmax(-1)
            yield token, state
            input_ids = token[:, None]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache_params: StreamState | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The prompt, then the last token and the state before it.

        With `cache_params` given to `generate()`, the prompt is what comes after that state.

        Raises:
            InputError: if the prompts are padded: each row has to end in its last token.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise InputError(
                "generate() takes prompts of one length, without padding; "
                "group them by length, or generate one at a time"
            )
        if use_cache is False or self.config.mixer != "resolvent":
            return {"input_ids": input_ids}
        new = input_ids if is_first_iteration or cache_params is None else input_ids[:, -1:]
        return {"input_ids": new, "cache_params": cache_params, "use_cache": True}

    def _reorder_cache(self, cache: StreamState, beam_idx: Tensor) -> StreamState:
        return cache.select(beam_idx)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is no cache of keys and values

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ResolventMixer | ConvolutionMixer | GreenMixer):
            init.normal_(module.conv.weight, std=self.config.conv_width**-0.5)
            init.zeros_(module.out_proj.get_parameter("weight"))
            if isinstance(module, ResolventMixer | GreenMixer):
                module.reset()
        elif isinstance(module, Features):
            module.reset()


def _quantized_keys(state_dict: Mapping[str, Any]) -> set[str]:
    """The keys that a float model does not have."""
    names = ("packed", "stored_scales", "log_scales", "zero_points", "second")
    return {key for key in state_dict if key.rpartition(".")[2] in names}


def _part(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The part of a whole batch's labels that are here."""
    if num_items_in_batch is None:
        return 1.0
    here = (labels[:, 1:] != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(here.device)
    return here / num_items_in_batch


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
        use_quantized_bk_core: make ready to quantize; the model is float until
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
        raise InputError(f"ResNetBKConfig has no fields {unknown}; it has {known}")
    if quantization_mode is not None and not use_quantized_bk_core:
        raise InputError("quantization_mode needs use_quantized_bk_core=True")
    config = ResNetBKConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_seq=n_seq, **options
    )
    model = ResNetBKForCausalLM(config)
    if use_quantized_bk_core:
        model.configure_quantization(quantization_mode or "ptq_int8")
    return model
