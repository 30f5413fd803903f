"""llama.cpp as the rival in `bkcore bench engines`: dense Llamas of any size, as files and running.

It is called through the C functions that `llama_cpp` binds with ctypes, without a sampler. Between
two tokens are a loop in Python, and numpy's argmax of the logits; `LlamaCpp.loop_seconds` says how
long both take.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bkcore.bench.own_engine import Tokens
from bkcore.errors import BenchmarkError, InputError
from bkcore.processes import ProcessDiedError, call_in_new_process

FORMATS = ("F32", "Q8_0", "Q4_0")
"""Of a file's matrices, the embedding among them. Norms are in float32."""

LONGEST = 32_768
"""Tokens that the Llamas are made for."""

_ROPE_BASE = 10_000.0
_PIECE = 512
"""Tokens that one call reads at most, as by llama-bench's default."""

_TINY = {"width": 128, "layers": 2, "heads": 2, "cached_heads": 1}
_CLOSE = {"F32": 2e-3, "Q8_0": 0.1, "Q4_0": 0.1}
"""How far logits may be from those of transformers, as a part of the largest: keys and values are
rounded to float16, and in Q8_0 and Q4_0 the inputs of every product to 8 bits."""
_CHECKED = 24
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def require_llama_cpp() -> None:
    """Raise where llama.cpp is not installed.

    Raises:
        InputError: saying how to install it.
    """
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} cannot be imported; install llama.cpp, which compiles for "
            "some minutes, with CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' pip install "
            "'bkcore[bench]', or measure bkcore alone with --no-rivals"
        )


def build_llama(
    vocab_size: int, width: int, layers: int, heads: int, cached_heads: int, hidden: int
) -> LlamaForCausalLM:
    """A dense Llama with random weights, whose head shares the embedding's weights.

    Args:
        vocab_size: tokens.
        width: of the residual stream.
        layers: each with attention and a perceptron.
        heads: of the queries.
        cached_heads: of keys and values, each shared by `heads / cached_heads` queries.
        hidden: units of a perceptron.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=cached_heads,
        intermediate_size=hidden,
        max_position_embeddings=LONGEST,
        head_dim=width // heads,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_BASE},
        initializer_range=width**-0.5,  # by default every token attends to all others alike
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path, form: str) -> int:
    """Write a Llama as a file that llama.cpp reads, without a tokenizer.

    Args:
        model: with tied embeddings.
        path: of the file.
        form: one of `FORMATS`.

    Returns:
        Bytes of its tensors.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _write_sizes(writer, model.config)
    size = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # the embedding, which llama.cpp takes for a missing head
            continue
        numbers = _in_pairs(model.config, name, tensor).float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise BenchmarkError(f"llama.cpp has no name for {name}")
        used = kind if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(numbers, used)
        writer.add_tensor(target, data, raw_dtype=used)
        size += data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes())  # in one piece, which stays in memory in huge pages
    return size


def _write_sizes(writer: Any, config: LlamaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(_ROPE_BASE)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _in_pairs(config: LlamaConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight (O, K), with the rows of queries and keys in llama.cpp's order.

    Rotary embedding turns pairs of channels of a head: transformers pairs channel i with i + d / 2,
    llama.cpp with its neighbour.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    channels = config.hidden_size // config.num_attention_heads
    halves = tensor.unflatten(0, (-1, 2, channels // 2))
    return halves.transpose(1, 2).flatten(0, 2)


class LlamaCpp:
    """A file in llama.cpp: one text that is read and continued.

    Args:
        path: what `write_gguf` wrote.
        length: tokens that the text may have.
        flash_attention: whether attention is computed so.

    Attributes:
        position: tokens of the text.
    """

    def __init__(self, path: Path, length: int, flash_attention: bool) -> None:
        library = self._library = _quiet_library()
        self.position = 0
        options = library.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise _failure(f"does not load {path}")
        settings = library.llama_context_default_params()
        settings.n_ctx = length
        settings.n_batch = settings.n_ubatch = _PIECE
        settings.flash_attn_type = int(flash_attention)
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise _failure(f"has no room for {length} tokens of {path}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        batch = self._batch = library.llama_batch_init(_PIECE, 0, 1)
        for place in range(_PIECE):
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        self._tokens, self._positions, self._wanted = (
            np.ctypeslib.as_array(pointer, (_PIECE,))
            for pointer in (batch.token, batch.pos, batch.logits)
        )
        self._decode: Callable[[Any, Any], int] = library.llama_decode

    def close(self) -> None:
        """Free the memory."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        self._library.llama_set_n_threads(self._context, count, count)

    def forget(self, position: int) -> None:
        """Cut the text to `position` tokens."""
        memory = self._library.llama_get_memory(self._context)
        if not self._library.llama_memory_seq_rm(memory, 0, position, -1):
            raise _failure(f"cannot cut a text to {position} tokens")
        self.position = position

    def read(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Read tokens (N,), N >= 1; returns the logits (V,) after the last."""
        for start in range(0, len(tokens), _PIECE):
            piece = tokens[start : start + _PIECE]
            count = self._batch.n_tokens = len(piece)
            self._tokens[:count] = piece
            self._positions[:count] = np.arange(self.position, self.position + count)
            self._wanted[:count] = np.arange(count) == count - 1
            self._run(count)
        return self._logits().copy()

    def greedy(self, first: int, steps: int) -> list[int]:
        """Read a token, then the likeliest next ones: `steps` tokens, of which the last is not
        read."""
        found, token = [], first
        self._batch.n_tokens, self._wanted[0] = 1, 1
        for _ in range(steps):
            self._tokens[0], self._positions[0] = token, self.position
            self._run(1)
            token = int(self._logits().argmax())
            found.append(token)
        return found

    def loop_seconds(self, steps: int = 1000) -> float:
        """Seconds of a token in `greedy` that the loop and the argmax take, not llama.cpp."""
        position = self.position
        self.read(np.zeros(1, np.int64))  # logits to look at
        self._decode = lambda context, batch: 0
        try:
            start = perf_counter()
            self.greedy(0, steps)
            return (perf_counter() - start) / steps
        finally:
            self._decode = self._library.llama_decode
            self.forget(position)

    def _run(self, count: int) -> None:
        if self._decode(self._context, self._batch):
            raise _failure(f"cannot read {count} tokens after {self.position}")
        self.position += count

    def _logits(self) -> npt.NDArray[np.float32]:
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))


def describe() -> dict[str, str]:
    """The versions of llama.cpp, and the instructions that it was compiled for."""
    from importlib.metadata import version

    return {
        "llama-cpp-python": version("llama-cpp-python"),
        "gguf": version("gguf"),
        "system": _quiet_library().llama_print_system_info().decode(),
    }


def check_llama_cpp() -> None:
    """Compare a small Llama in every format with transformers, so that a real model is timed.

    Another process does it: a library that was compiled wrongly ends its process.

    Raises:
        InputError: if llama.cpp is compiled for AMX. Beside PyTorch its kernels end the process
            with an illegal instruction; GCC 12.2 does not even compile them rightly.
        BenchmarkError: if logits or tokens differ, or the process ends.
    """
    if "AMX_INT8 = 1" in describe()["system"]:
        raise InputError(
            "llama.cpp is compiled for AMX, whose kernels do not run beside PyTorch; install it "
            "again with CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8 and pip's --force-reinstall "
            "--no-cache-dir"
        )
    try:
        call_in_new_process(_check_small)
    except ProcessDiedError as error:
        raise BenchmarkError(
            f"llama.cpp ended its process with exit code {error.exit_code} on a small model; "
            "install it again with another compiler (CC=clang CXX=clang++) and pip's "
            "--force-reinstall --no-cache-dir"
        ) from error


def _check_small(send: Callable[[object], None]) -> None:
    del send
    model = build_llama(64, hidden=160, **_TINY)
    with TemporaryDirectory() as folder:
        for form in FORMATS:
            path = Path(folder) / form
            write_gguf(model, path, form)
            for flash_attention in (False, True):
                with closing(LlamaCpp(path, 256, flash_attention)) as engine:
                    check_engine(engine, model, form)


@torch.inference_mode()
def check_engine(engine: LlamaCpp, model: LlamaForCausalLM, form: str) -> None:
    """Compare the logits of a text, and the token after it, with those of transformers.

    Args:
        engine: before its first token, as it is afterwards.
        model: what its file was made of; its weights are rounded as in the file.
        form: of the file.

    Raises:
        BenchmarkError: if they differ by more than rounding.
    """
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=_CHECKED)
    expected = _rounded(model, form)(torch.from_numpy(tokens)[None]).logits[0, -1].numpy()
    what = f"llama.cpp's logits in {form} differ from those of transformers"
    check_close(engine.read(tokens), expected, _CLOSE[form], what)
    engine.forget(_CHECKED - 1)
    (written,) = engine.greedy(int(tokens[-1]), 1)
    engine.forget(0)
    likeliest = np.full(1, expected.max())
    what = f"the token that llama.cpp writes in {form} has another logit than the likeliest:"
    check_close(expected[[written]], likeliest, 2 * _CLOSE[form], what)


def _rounded(model: LlamaForCausalLM, form: str) -> LlamaForCausalLM:
    """A copy whose matrices have the values that a file in this format has."""
    import gguf

    kind, copy = gguf.GGMLQuantizationType[form], deepcopy(model)
    for matrix in (each for each in copy.parameters() if each.dim() == 2):
        data = gguf.quants.quantize(matrix.numpy(), kind)
        matrix.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
    return copy


def check_close(
    found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], limit: float, what: str
) -> None:
    """Raise if numbers differ by more than `limit` times the largest.

    Raises:
        BenchmarkError: if they do; `what` begins its message.
    """
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= limit:  # nor is NaN
        raise BenchmarkError(f"{what} by {error:.1e} of the largest, not at most {limit:.0e}")


_errors: list[str] = []
_callbacks: list[Any] = []


@cache
def _quiet_library() -> Any:
    """The bindings, with what llama.cpp would print kept back."""
    import llama_cpp

    def keep(level: int, text: bytes, data: object) -> None:
        if level == _ERROR:
            _errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    _callbacks.append(callback)  # the library only has its address
    llama_cpp.llama_backend_init()
    return llama_cpp


def _failure(what: str) -> BenchmarkError:
    said = f": {'; '.join(_errors[-3:])}" if _errors else ""
    return BenchmarkError(f"llama.cpp {what}{said}")
