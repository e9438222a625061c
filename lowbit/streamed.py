"""The base model where it does not fit the device: layer by layer from host memory, over all windows of a text."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.hostmodel import HostModel, Progress, silent
from lowbit.kernels.modules import unpack_linears


class StreamedModel:
    """Final hidden states of known windows, with the face of a LlamaForCausalLM that ``quality.Reference`` looks at.

    ``model(input_ids=[1, window])`` hands out the hidden states of the next window, in the order in which they were
    computed. Raises LowbitError for any other tokens. On the device are only the final norm's weight, the head and
    the window at hand.
    """

    def __init__(self, config: Any, head: nn.Module, norm: nn.Module, windows: Tensor, hidden: list[Tensor]) -> None:
        self.config = config
        self.lm_head = head
        self.model = _Inner(norm, windows, hidden)


class _Inner:
    def __init__(self, norm: nn.Module, windows: Tensor, hidden: list[Tensor]) -> None:
        self.norm = norm
        self._states: Iterator[tuple[Tensor, Tensor]] = zip(windows, hidden, strict=True)

    def __call__(self, input_ids: Tensor, use_cache: bool = False, past_key_values: None = None) -> Any:
        ids, hidden = next(self._states, (None, None))
        if ids is None or hidden is None or not torch.equal(ids, input_ids[0].to(ids.device)):
            raise LowbitError("a streamed model was computed for other windows: score the same text, once, in order")
        return SimpleNamespace(last_hidden_state=hidden[None].to(input_ids.device))


@torch.no_grad()
def stream(
    host: HostModel, device: torch.device, dtype: torch.dtype, windows: Tensor, progress: Progress = silent
) -> StreamedModel:
    """Run ``windows`` [W, window] int64 through the model in ``dtype``, with one layer at a time on the device.

    Each layer runs inside transformers' own LlamaModel.forward, as its only layer and with the final norm taken out,
    so masks and rotary embeddings are the model's. Hidden states wait in host memory: W x window x hidden_size x 2
    bytes, 2.4 GB for Llama-3.1-8B and WikiText-2; the layers' weights cross the bus once.
    """
    whole = host.skeleton()
    whole.eval()
    config = whole.config
    config.dtype = dtype
    inner = whole.model
    layers, norm = list(inner.layers), inner.norm
    inner.rotary_emb.to(device)  # keeps its fp32
    inner.norm = nn.Identity()

    inner.embed_tokens.to(device).to(dtype)
    hidden = [inner.embed_tokens(ids[None].to(device))[0].cpu() for ids in windows]
    inner.embed_tokens = nn.Embedding(1, 1, device="meta")
    count = config.num_hidden_layers
    config.num_hidden_layers = 1
    try:
        for index in range(count):
            inner.layers = nn.ModuleList()  # frees the former one before the next is copied
            inner.layers.append(layers.pop(0).to(device).to(dtype))
            unpack_linears(inner.layers, dtype)
            for window, state in enumerate(hidden):
                embeds = state[None].to(device)
                hidden[window] = inner(inputs_embeds=embeds, use_cache=False).last_hidden_state[0].cpu()
            progress(f"{host.name}: {index + 1} of {count} layers streamed over {len(windows)} windows")
    finally:
        config.num_hidden_layers = count
    inner.layers = nn.ModuleList()
    norm.to(device).to(dtype)
    whole.lm_head.to(device).to(dtype)
    unpack_linears(whole, dtype)
    hidden = [norm(state[None].to(device))[0].cpu() for state in hidden]
    return StreamedModel(config, whole.lm_head, norm, windows, hidden)
