"""Generator: a Llama in a low-bit format that streams tokens.

generator = Generator.from_model("embedded", format="a16w4_g128")
for token in generator("Once upon a time", max_new_tokens=64):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowbit import backends, device, formats, models, packed_file
from lowbit.backends import native
from lowbit.errors import LowbitError, unknown
from lowbit.formats import FORMATS, Format, stored
from lowbit.formats.row import KV_FORMATS, TABLES
from lowbit.generate.detokenizer import Detokenizer
from lowbit.generate.runner import Runner, make_runner
from lowbit.hostmodel import Progress, silent
from lowbit.kernels.keeping import kept_together
from lowbit.kernels.stream import LAYOUTS
from lowbit.sampling import GREEDY, Sampling

CACHES = tuple(name for name in KV_FORMATS if name != "fp8_attn")
"""What a Generator's KV cache can hold; attention that multiplies the codes themselves is for the benches."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Token(NamedTuple):
    """One generated token: its id, the text that it completes, and, with the last one, why it is the last."""

    id: int
    text: str
    finish: Literal["eos", "length"] | None = None


class Generator:
    """Generates from one prompt at a time with a model that may be quantized.

    ``context`` is the longest prompt and answer together; None lets the KV cache grow with what is asked, up to the
    model's own limit. ``kv`` is what that cache holds: int8, fp8, int4, or "" for the activations' own dtype.
    ``runner`` is what generates, once something was asked: its ``name`` tells which.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, context: int | None = None, kv: str = "") -> None:
        limit = int(model.config.max_position_embeddings)
        if context is not None and not 1 <= context <= limit:
            raise LowbitError(f"context: expected 1 to {limit} tokens (max_position_embeddings), got {context}")
        if kv and kv not in CACHES:
            raise unknown("KV cache format of a Generator", kv, CACHES)
        self.model, self.tokenizer, self.context, self.kv = model, tokenizer, context, kv
        self.runner: Runner | None = None
        self._limit = limit
        self._round = 0

    @classmethod
    def from_model(
        cls,
        model: Any,
        format: str | None = "a16w4_g128",
        *,
        device: torch.device | str | None = None,
        tokenizer: Any = None,
        context: int | None = None,
        kv: str | None = None,
        progress: Progress = silent,
    ) -> Generator:
        """A LlamaForCausalLM, a preset (``embedded``), a folder or a hub id, quantized.

        ``format`` is a row's name or id (``a16w4_g128`` is ``a16w4_g128-lowbit``), None for the model as it is; ``kv``
        what the KV cache holds, None as the format says. ``device`` defaults to the model's, for a name to the first
        GPU or the CPU. A model that is given stays as it is; what is not quantized shares its memory. Raises
        LowbitError where the format can't run.
        """
        if isinstance(model, str | Path):
            return cls._load(str(model), format, device, tokenizer, context, kv, progress)
        fmt = None if format is None else _find(format)
        target = torch.device(device) if device is not None else model.model.norm.weight.device
        if fmt is not None:
            _check(fmt, target, model.config)
        return cls(_converted(model, fmt, target), tokenizer, context=context, kv=_cache(fmt, kv))

    @classmethod
    def from_packed(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        tokenizer: Any = None,
        context: int | None = None,
        kv: str = "",
    ) -> Generator:
        """From a file that ``save`` wrote, bit for bit. Raises LowbitError on any other file."""
        return cls(packed_file.load(Path(path), device), tokenizer, context=context, kv=kv)

    @classmethod
    def _load(
        cls,
        name: str,
        format: str | None,
        wanted: Any,
        tokenizer: Any,
        context: int | None,
        kv: str | None,
        progress: Progress,
    ) -> Generator:
        where = device.detect() if wanted is None else device.of(torch.device(wanted))
        choice = models.choose(name, "auto", where)
        how = stored.read(choice.config, choice.name)
        own = None if how is None else stored.as_row(how)  # a quantized checkpoint as it is
        fmt = own if format is None else _find(format)
        if fmt is not None:
            _check(fmt, where.torch, choice.config)
        host = models.load(choice, progress, pin=where.kind == "cuda")
        base = FORMATS["bf16-torch"] if fmt is None else fmt
        dtype = DTYPES[where.dtype_for(base) or "fp16"]

        def transform(module: nn.Module) -> None:
            if fmt is not None:
                backends.get(fmt.backend).quantize(module, fmt, dtype)

        packed = base.backend == "checkpoint"
        made = host.build(where.torch, dtype, transform, tables=_tables(fmt), packed=packed, progress=progress)
        return cls(made, tokenizer or host.tokenizer, context=context, kv=_cache(fmt, kv))

    def save(self, path: str | Path) -> None:
        """Write the packed model to one safetensors file. Raises LowbitError for other libraries' formats."""
        packed_file.save(self.model, Path(path))

    def __call__(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        *,
        sampling: Sampling = GREEDY,
        stop_at_eos: bool = True,
    ) -> Iterator[Token]:
        """The tokens that follow ``prompt`` (text, or token ids), as they come; the next call ends this stream.

        With ``stop_at_eos`` an end-of-text token is the last one. The same seed gives the same tokens again. Raises
        LowbitError, at once, on a prompt that is empty or not of this vocabulary, or too long with its answer.
        """
        ids = self._encode(prompt)
        if max_new_tokens < 1:
            raise LowbitError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}")
        runner = self._ready(ids.shape[1] + max_new_tokens)
        runner.reset(sampling)
        self._round += 1
        return self._stream(runner, ids, max_new_tokens, self.eos if stop_at_eos else frozenset(), self._round)

    @property
    def eos(self) -> frozenset[int]:
        """The tokens that end a text: those of the generation config, else of the config."""
        for config in (getattr(self.model, "generation_config", None), self.model.config):
            found = getattr(config, "eos_token_id", None)
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
        return frozenset()

    def _encode(self, prompt: str | Sequence[int] | Tensor) -> Tensor:
        """[1, S] int64 on the model's device."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise LowbitError("a prompt in words needs a tokenizer, and this generator has none: give token ids")
            prompt = self.tokenizer(prompt)["input_ids"]
        ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(1, -1)
        vocabulary = self.model.config.vocab_size
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            found = f"{int(ids.min())} to {int(ids.max())}" if ids.numel() else "none"
            raise LowbitError(f"the prompt: expected one token id or more of 0 to {vocabulary - 1}, got {found}")
        return ids.to(self.model.model.norm.weight.device)

    def _ready(self, tokens: int) -> Runner:
        """A runner with room for this many tokens."""
        limit = self.context or self._limit
        if tokens > limit:
            what = "context" if self.context else "model's max_position_embeddings"
            raise LowbitError(f"prompt and answer take {tokens} tokens, the {what} allows {limit}: ask for fewer")
        if self.runner is None or self.runner.length < tokens:
            self.runner = None  # its cache is freed before the larger one is made
            length = self.context or min(limit, max(SHORTEST, 1 << (tokens - 1).bit_length()))
            self.runner = make_runner(self.model, 1, length, self.kv)
        return self.runner

    def _stream(self, runner: Runner, ids: Tensor, count: int, eos: frozenset[int], number: int) -> Iterator[Token]:
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer)
        reader = _Reader(ids.device)
        reader.put(runner.prefill(ids))
        for index in range(count):
            if self._round != number:
                raise LowbitError("this generator was called again: a stream ends where the next one begins")
            if index + 1 < count:
                reader.put(runner.step())  # the device is at work on it while the host looks at the one before
            token = reader.take()
            finish: Literal["eos", "length"] | None = None
            if token in eos or index + 1 == count:
                finish = "eos" if token in eos else "length"
            text = ""
            if detokenizer is not None:
                text = detokenizer.add(token) + (detokenizer.finish() if finish else "")
            yield Token(token, text, finish)
            if finish:
                return


SHORTEST = 256
"""Tokens of the smallest KV cache that is made where no ``context`` is given."""


class _Reader:
    """Brings tokens [1, 1] to the host, in order and at most one behind, without holding the device up."""

    def __init__(self, where: torch.device) -> None:
        self._cuda = where.type == "cuda"
        self._slots = torch.empty(2, dtype=torch.int64, pin_memory=self._cuda)
        self._events = [torch.cuda.Event() for _ in range(2)] if self._cuda else []  # type: ignore[no-untyped-call]
        self._put = self._taken = 0

    def put(self, token: Tensor) -> None:
        slot = self._put % 2
        self._slots[slot : slot + 1].copy_(token.view(1), non_blocking=True)
        if self._cuda:
            self._events[slot].record()
        self._put += 1

    def take(self) -> int:
        slot = self._taken % 2
        if self._cuda:
            self._events[slot].synchronize()
        self._taken += 1
        return int(self._slots[slot])


def _find(name: str) -> Format:
    return formats.find(name if name in FORMATS else f"{name}-lowbit")


def _tables(fmt: Format | None) -> list[str]:
    return [name for name in TABLES if fmt is not None and name in fmt.targets]


def _cache(fmt: Format | None, asked: str | None) -> str:
    """What the KV cache holds: as asked, else as the format says."""
    if asked is not None:
        return asked
    return "" if fmt is None else fmt.kv


def _check(fmt: Format, target: torch.device, config: Any) -> None:
    unmet = backends.unmet(fmt, device.of(target), config)
    if unmet is not None:
        raise LowbitError(f"{fmt.id} can't run here: {unmet}")
    if fmt.calibration_windows:
        raise LowbitError(f"{fmt.id} is calibrated on a text, which only the benches do so far: take another format")


def _converted(model: Any, fmt: Format | None, target: torch.device) -> Any:
    """The model in this format on this device, layer by layer; the one that was given stays as it is."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    made = copy.deepcopy(model, memo)
    owners = {"lm_head": made, "embed_tokens": made.model}
    tables = nn.ModuleDict({name: getattr(owners[name], name) for name in _tables(fmt)})
    dtype = _dtype(fmt, target, made.model.norm.weight.dtype)
    with kept_together(target):
        for part in (*made.model.layers, tables):
            part.to(target, dtype)
            if fmt is not None:
                backends.get(fmt.backend).quantize(part, fmt, dtype)
    for name, table in tables.items():
        setattr(owners[name], name, table)
    return made.to(target, dtype).eval()


def _dtype(fmt: Format | None, target: torch.device, given: torch.dtype) -> torch.dtype:
    """A model keeps its dtype, but where the decode kernels want another one: fp16 beside integer weights."""
    rows = [] if fmt is None else formats.rows_of(fmt)
    streamed = all(row.backend == "lowbit" and row.scheme in LAYOUTS for row in rows) and native.streams(target)
    wanted = {torch.bfloat16 if row.scheme == "bf16" else torch.float16 for row in rows}
    return wanted.pop() if streamed and len(wanted) == 1 else given
