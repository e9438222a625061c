"""HostModel: one model's weights in host memory, read once a session, and the fresh device copies made from them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.hostmemory import Arena, PinningFailed, worker_count
from lowbit.kernels.keeping import kept_together
from lowbit.kernels.modules import packed_modules, unpack_linears

Progress = Callable[[str], None]

PIECE = 32 * 2**20
"""Bytes that one thread hashes at a time."""

CAST = 2**26
"""Numbers of a tensor that are cast on a GPU at a time: a table of Llama-3.1-8B would be there twice, 2 GiB."""


def silent(text: str) -> None:
    """The progress callback that shows nothing."""


@dataclass(eq=False)
class HostModel:
    """The master: weights in host memory, in the type of their file (bf16 for dummy weights), never written again.
    The linears of a checkpoint that is quantized already are packed there (lowbit/prequantized.py).

    ``master`` is a LlamaForCausalLM over those bytes; call ``build`` or ``skeleton`` for one to work with.
    ``checkpoint_bytes`` is the size of its tensors as files hold them. ``tokenizer`` is None for dummy weights and for
    a folder without tokenizer.json. ``notes`` say what did not go as planned (page-locking refused).
    """

    name: str
    load_format: str
    config: Any
    master: Any
    arenas: list[Arena]
    checkpoint_bytes: int
    tokenizer: Any = None
    load_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """How many; a tied head counts once."""
        packed: int = sum(module.n * module.k for module in packed_modules(self.master).values())
        plain: int = sum(parameter.numel() for parameter in self.master.parameters())
        return packed + plain

    @property
    def dtype(self) -> torch.dtype:
        """The type that the embedding is stored in."""
        dtype: torch.dtype = self.master.model.embed_tokens.weight.dtype
        return dtype

    @property
    def pinned(self) -> bool:
        return all(arena.pinned for arena in self.arenas)

    def checksum(self) -> str:
        """A digest of the master's every name, type, shape and byte, by all threads."""
        named = [*self.master.named_parameters(remove_duplicate=False), *self.master.named_buffers()]
        digest = hashlib.blake2b(digest_size=16)
        pieces = []
        for name, tensor in named:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.device}".encode())
            data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            pieces += [data[low : low + PIECE] for low in range(0, len(data), PIECE)]
        with ThreadPoolExecutor(worker_count()) as workers:
            for part in workers.map(lambda piece: hashlib.blake2b(piece, digest_size=16).digest(), pieces):
                digest.update(part)
        return digest.hexdigest()

    def skeleton(self) -> Any:
        """A LlamaForCausalLM with modules, Parameters and config of its own whose tensors share the master's memory.

        Replacing or converting its parameters is safe. Writing into them is not: that needs ``build``.
        """
        memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.master.parameters()}
        memo |= {id(b): b for b in self.master.buffers()}
        return copy.deepcopy(self.master, memo)

    def build(
        self,
        device: torch.device,
        dtype: torch.dtype,
        transform: Callable[[nn.Module], None] | None = None,
        *,
        tables: Collection[str] = (),
        packed: bool = False,
        progress: Progress = silent,
    ) -> Any:
        """A fresh LlamaForCausalLM on ``device`` with weights in ``dtype``, in eval mode, without gradients.

        Each decoder layer is copied and then given to ``transform``, which quantizes it in place, before the next one
        is copied: the peak is what is quantized so far plus one layer. ``tables`` names those of
        lm_head and embed_tokens that it gets too, last and together, as the only children of a module. A tied head is
        tied on the device as well, until a transform replaces it. Buffers
        (RoPE's inverse frequencies) keep fp32. The linears of a checkpoint that is quantized already are dequantized
        before ``transform`` sees them; ``packed`` leaves them as they are.
        """
        if device.type == "cuda":
            self.pin(device)
        model = self.skeleton()
        model.config.dtype = dtype
        layers = model.model.layers
        with torch.no_grad(), kept_together(device):
            for index, layer in enumerate(layers):
                _move(layer.modules(), device, dtype)
                if not packed:
                    unpack_linears(layer, dtype)
                if transform is not None:
                    transform(layer)
                progress(f"{self.name}: {index + 1} of {len(layers)} layers on {device}")
            # a plain table last: it need not lie beside the head's 16 bits, 1 GiB each in Llama-3.1-8B
            last = [] if "embed_tokens" in tables or _tied(model) else [model.model.embed_tokens]
            _move(_outside(model, last), device, dtype)
            if not packed:
                unpack_linears(model, dtype, _outside(model))  # what the transform has packed inside is to stay
            if transform is not None and tables:
                _transform_tables(model, tables, transform)
            _move(last, device, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return model.eval()

    def pin(self, device: torch.device) -> None:
        """Page-lock the weights for fast copies, once. A refusal is noted, and copies are made from pageable memory."""
        if self.pinned or self.notes:
            return
        with ThreadPoolExecutor(worker_count()) as workers:
            self.note_pinning([workers.submit(arena.pin, device) for arena in self.arenas])

    def note_pinning(self, pinning: list[Future[None]]) -> None:
        """Wait for the arenas that are being page-locked and keep in ``notes`` why some were not."""
        refusals = [error for future in pinning if isinstance(error := future.exception(), PinningFailed)]
        for future in pinning:
            if future.exception() not in refusals:
                future.result()
        if refusals:
            self.notes.append(
                f"{len(refusals)} of {len(pinning)} pieces of host memory are not page-locked, so copies to the "
                f"device are slow: {refusals[0]}"
            )


def _outside(model: Any, but: Collection[nn.Module] = ()) -> list[nn.Module]:
    """Every module that belongs to no decoder layer. Not to be held on to: a head in it stays when it is replaced."""
    inside = {module for layer in model.model.layers for module in layer.modules()}
    return [module for module in model.modules() if module not in inside and module not in but]


def _tied(model: Any) -> bool:
    return getattr(model.lm_head, "weight", None) is model.model.embed_tokens.weight


def _transform_tables(model: Any, names: Collection[str], transform: Callable[[nn.Module], None]) -> None:
    """Give ``transform`` the tables alone: the model holds none of them meanwhile, so each is freed once replaced."""
    owners = {"lm_head": model, "embed_tokens": model.model}
    holder = nn.ModuleDict({name: getattr(owners[name], name) for name in names})
    for name in names:
        setattr(owners[name], name, nn.Identity())
    transform(holder)
    for name in names:
        setattr(owners[name], name, holder[name])


def _move(modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Give these modules copies of their own direct parameters and buffers; a shared parameter stays shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(_copy(parameter.data, device, dtype), requires_grad=False)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, _copy(buffer, device, buffer.dtype))


def _copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu":
        return tensor.to(dtype, copy=True)
    # Cast on the device: a cast on the way would be done on the host, in one thread.
    if tensor.dtype == dtype or tensor.numel() <= CAST:
        return tensor.to(device, non_blocking=True).to(dtype)
    cast = torch.empty_like(tensor, dtype=dtype, device=device)
    rows = max(1, CAST // tensor[0].numel())
    for row in range(0, len(tensor), rows):
        cast[row : row + rows] = tensor[row : row + rows].to(device, non_blocking=True)
    return cast
