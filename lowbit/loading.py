"""Fills a HostModel: from a folder's safetensors or with dummy weights, by as many threads as the memory can feed."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit import checkpoint, dummy, formats, prequantized
from lowbit.errors import LowbitError
from lowbit.formats.layouts import Stored
from lowbit.hostmemory import Arena, Bytes, Spec, available_bytes, worker_count
from lowbit.hostmodel import HostModel, Progress
from lowbit.prequantized import Matrix
from lowbit.quiet import quiet_import

Fill = Callable[[str, Bytes, int], None]
"""(name of a tensor, the bytes to fill, where in the tensor they start)"""

PIECE = 32 * 2**20
"""Bytes that one thread reads or makes at a time."""


def load_folder(name: str, folder: Path, progress: Progress, *, pin: bool) -> HostModel:
    """Read the safetensors of a Hugging Face folder. Raises LowbitError when they don't make a whole Llama."""
    started = time.perf_counter()
    config = checkpoint.read_config(folder)
    stored, matrices, entries = read_headers(folder, config)

    def fill(key: str, out: Bytes, start: int) -> None:
        checkpoint.read_bytes(entries[key], out, start)

    with ThreadPoolExecutor(worker_count()) as workers:
        specs = {name: entry.spec for name, entry in entries.items()}
        host = _assemble(name, "auto", config, specs, fill, workers, progress, pin=pin, matrices=matrices)
    if config.tie_word_embeddings and checkpoint.HEAD in stored and checkpoint.EMBEDDING in stored:
        _check_tied(stored[checkpoint.HEAD], host, folder)
    host.tokenizer = _read_tokenizer(folder)
    host.load_s = time.perf_counter() - started
    return host


def read_headers(
    folder: Path, config: Any
) -> tuple[dict[str, checkpoint.Entry], dict[str, Matrix], dict[str, checkpoint.Entry]]:
    """What the folder stores, its packed matrices, and the entry of each parameter; reads no weights.

    Raises LowbitError for files that are cut short, are something else, or don't make a whole Llama.
    """
    how = formats.stored.read(config, str(folder))
    stored = checkpoint.read_index(folder, quantized=how is not None)
    matrices: dict[str, Matrix] = {}
    if how is not None:
        matrices, stored = _find_matrices(stored, config, how, folder)
    return stored, matrices, checkpoint.match(stored, config, folder, [f"{path}.weight" for path in matrices])


def _find_matrices(
    stored: dict[str, checkpoint.Entry], config: Any, how: Stored, folder: Path
) -> tuple[dict[str, Matrix], dict[str, checkpoint.Entry]]:
    try:
        return prequantized.find_matrices(stored, checkpoint.parameter_shapes(config), how)
    except LowbitError as error:
        raise LowbitError(f"the tensors in {folder} don't fit its config.json: {error}") from error


def load_dummy(name: str, config: Any, progress: Progress, *, pin: bool) -> HostModel:
    """Make bf16 weights of the true shape (``lowbit.dummy``)."""
    started = time.perf_counter()
    specs = {n: Spec(shape, torch.bfloat16) for n, shape in checkpoint.parameter_shapes(config).items()}
    with ThreadPoolExecutor(worker_count()) as workers:
        source = dummy.Source(sum(spec.nbytes for spec in specs.values()) // 2, workers)

        def fill(key: str, out: Bytes, start: int) -> None:
            source.fill(out.view(np.uint16), key, start // 2)

        host = _assemble(name, "dummy", config, specs, fill, workers, progress, pin=pin)
    host.load_s = time.perf_counter() - started
    return host


def _assemble(
    name: str,
    load_format: str,
    config: Any,
    specs: dict[str, Spec],
    fill: Fill,
    workers: ThreadPoolExecutor,
    progress: Progress,
    *,
    pin: bool,
    matrices: Mapping[str, Matrix] = MappingProxyType({}),
) -> HostModel:
    """Fill one arena per decoder layer and one for the rest, all threads at work, and put a model over them."""
    packed = {path: matrix.specs() for path, matrix in matrices.items()}
    specs = specs | {key: spec for parts in packed.values() for key, spec in parts.items()}
    total = sum(spec.nbytes for spec in specs.values())
    _check_room(name, total)
    groups: dict[str, dict[str, Spec]] = {}
    for key, spec in specs.items():
        layer = re.match(r"model\.layers\.\d+\.", key)
        groups.setdefault(layer[0] if layer else "rest", {})[key] = spec
    arenas = [Arena(group) for group in groups.values()]
    apart = {key for parts in packed.values() for key in parts}
    waiting = [[workers.submit(fill, *piece) for piece in _pieces(arena) if piece[0] not in apart] for arena in arenas]
    for arena, futures in zip(arenas, waiting, strict=True):
        here = [matrix for path, matrix in matrices.items() if f"{path}.codes" in arena.tensors]
        futures += [workers.submit(_read_matrix, matrix, arena) for matrix in here]
    device = torch.device("cuda", torch.cuda.current_device()) if pin else None
    pinning: list[Future[None]] = []
    layers = config.num_hidden_layers
    try:
        for index, (arena, futures) in enumerate(zip(arenas, waiting, strict=True)):
            for future in futures:
                future.result()
            if device is not None:
                pinning.append(workers.submit(arena.pin, device))
            progress(
                f"loading {name}: {index + 1} of {layers} layers" if index < layers else f"loading {name}: the head"
            )
    except BaseException:
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    tensors = {key: tensor for arena in arenas for key, tensor in arena.tensors.items()}
    host = HostModel(name, load_format, config, _model_over(config, tensors, matrices), arenas, total)
    host.note_pinning(pinning)
    return host


def _pieces(arena: Arena) -> Iterator[tuple[str, Bytes, int]]:
    for name, data in arena.data.items():
        for low in range(0, len(data), PIECE):
            yield name, data[low : low + PIECE], low


def _read_matrix(matrix: Matrix, arena: Arena) -> None:
    for name, tensor in prequantized.read(matrix).items():
        arena.tensors[f"{matrix.path}.{name}"].copy_(tensor)


def _model_over(config: Any, tensors: dict[str, Tensor], matrices: Mapping[str, Matrix]) -> Any:
    """A LlamaForCausalLM whose parameters are these tensors, with packed linears for ``matrices``."""
    llama = quiet_import("transformers.models.llama.modeling_llama")
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(copy.deepcopy(config))
    model.model.rotary_emb = llama.LlamaRotaryEmbedding(model.config)  # its buffers are in no file
    for path, matrix in matrices.items():
        parts = {name.rpartition(".")[2]: tensors.pop(name) for name in matrix.specs()}
        bias = tensors.pop(f"{path}.bias", None)
        model.set_submodule(path, prequantized.module(matrix, parts, bias))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _check_tied(head: checkpoint.Entry, host: HostModel, folder: Path) -> None:
    """A tied model's file may hold the head too, if it is the embedding. Raises LowbitError if it isn't."""
    embedding = host.arenas[-1].data[checkpoint.EMBEDDING]
    buffer = np.empty(min(PIECE, len(embedding)), dtype=np.uint8)
    for low in range(0, len(embedding), PIECE):
        part = embedding[low : low + PIECE]
        checkpoint.read_bytes(head, buffer[: len(part)], low)
        if not np.array_equal(buffer[: len(part)], part):
            raise LowbitError(
                f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but the file's "
                "lm_head.weight differs from embed_tokens.weight; set tie_word_embeddings to false if it is meant"
            )


def _check_room(name: str, total: int) -> None:
    available = available_bytes()
    if available is not None and total > available:
        raise LowbitError(
            f"{name} needs {total / 2**30:.1f} GiB of host memory for its weights, {available / 2**30:.1f} GiB are "
            "available; free some, or take a smaller model (--model llama-3.2-1b, --model embedded)"
        )


def _read_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer, exactly as tokenizer.json says, or None without that file."""
    if not (folder / "tokenizer.json").exists():
        return None
    # Not AutoTokenizer: it may rebuild a "LlamaTokenizer" by its own rules, or run a checkpoint's code.
    fast = quiet_import("transformers").PreTrainedTokenizerFast
    try:
        return fast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise LowbitError(f"can't read the tokenizer in {folder}: {error}") from error
