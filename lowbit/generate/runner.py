"""Runner: what generates token after token behind a Generator. Fast ones register themselves; one takes any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.generate import native
from lowbit.generate.decoder import Decoder
from lowbit.sampling import GREEDY, Chosen, Sampler, Sampling


class Runner(Protocol):
    """One model with its KV cache for ``batch`` sequences of up to ``length`` tokens.

    A round is ``reset(sampling)``, ``prefill(ids)``, then ``step()`` again and again: each takes the token that came
    before from the device, where nothing waits for the host. Tokens are [batch, 1] int64 on the device and valid until
    the next call. ``position`` counts the cache's tokens on the host; a call that would exceed ``length`` raises
    LowbitError. ``name`` says what runs, for users to read.
    """

    name: str
    length: int

    @property
    def position(self) -> int: ...

    def reset(self, sampling: Sampling) -> None: ...

    def prefill(self, ids: Tensor) -> Tensor: ...

    def step(self) -> Tensor: ...


Factory = Callable[[Any, int, int, str], Runner | None]
"""(model, batch, length, what the KV cache holds) -> a runner for it, or None where it can't: another device, format,
cache or shape. The cache is one of KV_FORMATS, "": the activations' own dtype."""

_factories: dict[str, Factory] = {"native": native.offer}


def register_runner(name: str, factory: Factory) -> None:
    """Offer a runner; the first registered one that takes a model runs it. The same name again replaces it."""
    _factories[name] = factory


def unregister_runner(name: str) -> None:
    """Take an offer back."""
    del _factories[name]


def make_runner(model: Any, batch: int, length: int, kv: str = "") -> Runner:
    """The first registered runner that takes this model on its device, else DecoderRunner, which takes any."""
    for factory in _factories.values():
        runner = factory(model, batch, length, kv)
        if runner is not None:
            return runner
    return DecoderRunner(model, batch, length, kv)


class DecoderRunner:
    """Runs the model's own modules, whatever backend they are of, without a graph."""

    name = "PyTorch modules"

    def __init__(self, model: Any, batch: int, length: int, kv: str = "") -> None:
        self.length = length
        if kv:
            self.name = f"{self.name}, KV cache in {kv}"
        device = model.model.norm.weight.device
        self._chosen = Chosen(Sampler(GREEDY, batch, device))
        self._decoder = Decoder(model, batch, length, pick=self._chosen, kv=kv)

    @property
    def position(self) -> int:
        return self._decoder.used

    def reset(self, sampling: Sampling) -> None:
        """Sample like this from now on, from the seed's first draw."""
        self._chosen.reset(sampling)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """ids [batch, S] into an empty cache -> the first token."""
        return self._decoder.prefill(ids)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token."""
        return self._decoder.decode(1)
