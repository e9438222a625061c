"""The runner of lowbit's own CUDA kernels: a whole step, sampling included, is one CUDA graph, and so is a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.backends import native
from lowbit.generate.decoder import Decoder
from lowbit.kernels import batch as batches
from lowbit.kernels import runner
from lowbit.kernels.stream_modules import StreamLinear
from lowbit.sampling import GREEDY, Chosen, Sampler, Sampling


class NativeRunner:
    """1 to 8 sequences of a model whose linears are streamed (lowbit.backends.native on SM90); see ``Runner``."""

    name = "lowbit's CUDA kernels, one graph per token"

    def __init__(self, model: Any, batch: int, length: int, kv: str = "") -> None:
        self.length = length
        if kv:
            self.name = f"{self.name}, KV cache in {kv}"
        self._sampling = GREEDY
        self._chosen = Chosen(Sampler(GREEDY, batch, model.model.norm.weight.device))
        self._decoder = Decoder(model, batch, length, pick=self._chosen, kv=kv)

    @property
    def position(self) -> int:
        return self._decoder.used

    def reset(self, sampling: Sampling) -> None:
        """Sample like this from now on, from the seed's first draw."""
        self._sampling = sampling
        if self._chosen.reset(sampling) and self._decoder.native is not None:
            self._decoder.pick_natively(self._greedily)

    @property
    def _greedily(self) -> bool:
        # the kernels' own arg max then chooses, and nothing is recorded behind it
        return self._sampling.kind == "greedy"

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """ids [batch, S] into an empty cache -> the first token. The first prompt also proves a step against eager."""
        if self._decoder.native is None:
            self._decoder.run_natively(ids, "Generator", greedily=self._greedily)
            self._chosen.reset(self._sampling)  # the proof has drawn
        return self._decoder.prefill(ids)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token."""
        return self._decoder.decode(1)


def takes(model: Any, batch: int, kv: str = "") -> bool:
    """Whether the kernels run this model: so many sequences, streamed weights, a device that they are written for, a
    KV cache (``kv`` as Format.kv) that they read."""
    head = model.lm_head
    if not isinstance(head, StreamLinear) or runner.unstreamed(model) is not None:
        return False
    device = head.part.stream.data.device
    if not native.streams(device):
        return False
    capability = torch.cuda.get_device_capability(device)
    formats = {module.format for module in model.modules() if isinstance(module, StreamLinear)}
    return all(batches.unmet(model.config, name, capability, batch, kv) is None for name in formats)


def offer(model: Any, batch: int, length: int, kv: str = "") -> NativeRunner | None:
    """For ``make_runner``: a runner of a model that the kernels take."""
    return NativeRunner(model, batch, length, kv) if takes(model, batch, kv) else None
