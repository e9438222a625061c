"""Sampling the next token by tensor operations that a CUDA graph can hold: greedy, temperature, top-k, top-p.

Nothing waits for the host, shapes are fixed, and what may change between replays (temperature, k, p, seed, how many
tokens were drawn) lies in device tensors. Order and meaning are transformers': logits / temperature, then the k
largest, then the smallest set of the rest whose probability reaches p; ties with the last one kept stay in.

Random numbers are a function of (seed, draw, row, token): the same on every device, whatever ran before, as Philox's
are (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), but by splitmix64's mixer (Steele, Lea,
Flood, OOPSLA 2014), which takes 8 operations on int64. The draw is an exponential race: argmax of log p - log E with
E ~ Exp(1) is a sample of p (the Gumbel-max trick). No running sum of floats decides anything: a GPU adds in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy, whatever else is set; ``top_k`` 0 and ``top_p`` 1 keep all.

    ``seed`` is 0 .. 2^63 - 1. Raises LowbitError on values outside of their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of 0 or more (0: greedy)"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1 (1: all tokens)"),
            ("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
        ):
            if not right:
                raise LowbitError(f"sampling: {name} is {getattr(self, name)}, expected {wanted}")

    @property
    def kind(self) -> str:
        """Which operations it takes: ``greedy``, ``random`` or ``filtered``. A graph is captured for one kind."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "random"


GREEDY = Sampling()


class Sampler:
    """Chooses tokens for ``batch`` sequences on ``device``: ``sampler(logits [B, 1, V] or [B, V]) -> [B, 1] int64``.

    Every call draws with the next number of the sequence that ``seed`` starts; ``set`` starts it anew.
    """

    def __init__(self, sampling: Sampling, batch: int, device: torch.device | str) -> None:
        self.kind, self.batch = sampling.kind, batch
        self.temperature = torch.ones(1, dtype=torch.float64, device=device)
        self.top_k = torch.zeros(1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(1, dtype=torch.float64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch, dtype=torch.int64, device=device).unsqueeze(1)
        self.set(sampling)

    def set(self, sampling: Sampling) -> None:
        """Other values of the same kind, and the first draw again. Raises LowbitError on another kind."""
        if sampling.kind != self.kind:
            raise LowbitError(f"this sampler is for {self.kind} sampling, got {sampling}: make another one")
        self.temperature.fill_(sampling.temperature or 1.0)
        self.top_k.fill_(sampling.top_k)
        self.top_p.fill_(sampling.top_p)
        self.seed.fill_(sampling.seed)
        self.drawn.zero_()

    def __call__(self, logits: Tensor) -> Tensor:
        flat = logits.reshape(self.batch, logits.shape[-1])
        if self.kind == "greedy":
            return flat.argmax(dim=-1, keepdim=True)
        scaled = flat.double() / self.temperature
        if self.kind == "filtered":
            scaled = filtered(scaled, self.top_k, self.top_p)
        token = (scaled - exponential(self.seed, self.drawn, self._rows, flat.shape[-1]).log()).argmax(-1, keepdim=True)
        self.drawn.add_(1)
        return token


@dataclass
class Chosen:
    """The sampler at hand, which another may replace. A decoder holds this and not the runner that holds the decoder:
    in a cycle a dropped runner's KV cache and CUDA graphs would stay until Python collects garbage."""

    sampler: Sampler

    def __call__(self, logits: Tensor) -> Tensor:
        return self.sampler(logits)

    def reset(self, sampling: Sampling) -> bool:
        """Sample like this from the seed's first draw on; whether that takes other operations, a sampler of its own."""
        if sampling.kind == self.sampler.kind:
            self.sampler.set(sampling)
            return False
        self.sampler = Sampler(sampling, self.sampler.batch, self.sampler.seed.device)
        return True


def filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [B, V], already divided by the temperature, with -inf for what top-k and top-p leave out."""
    vocabulary = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary) - 1  # [1]
    smallest = ordered.gather(-1, last.expand(ordered.shape[0], 1))
    probabilities = ordered.masked_fill(ordered < smallest, -torch.inf).softmax(-1)
    counts = (probabilities * FIXED_POINT).to(torch.int64)
    before = counts.cumsum(-1) - counts  # of all that are likelier; whole numbers, so that their order can't matter
    # at p = 1 the last ones, of probability below 2^-40, have all the mass before them and yet must stay
    kept = (before < (top_p * counts.sum(-1, keepdim=True))) | (top_p >= 1)
    kept = kept & (ordered >= smallest)
    smallest = ordered.gather(-1, kept.sum(-1, keepdim=True) - 1)
    return scaled.masked_fill(scaled < smallest, -torch.inf)


FIXED_POINT = float(1 << 40)
"""Probabilities are summed in units of its inverse: 10^-12."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GAMMA, MIX_1, MIX_2 = (_signed(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""splitmix64's constants as int64, whose products wrap around like those of uint64."""


def _shifted(value: Tensor, by: int) -> Tensor:
    """A logical shift to the right: int64 alone would drag its sign in."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def mix(value: Tensor) -> Tensor:
    """splitmix64's finalizer on int64: every bit of the input moves every bit of the output."""
    value = (value ^ _shifted(value, 30)) * MIX_1
    value = (value ^ _shifted(value, 27)) * MIX_2
    return value ^ _shifted(value, 31)


def exponential(seed: Tensor, draw: Tensor, rows: Tensor, count: int) -> Tensor:
    """Exp(1) numbers [B, count] in fp64: of seed [1], draw [1] and rows [B, 1]; never 0 and never infinite."""
    stream = mix(mix(seed + GAMMA) + (draw + 1) * GAMMA) + rows * MIX_1  # [B, 1]
    columns = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    bits = mix(mix(stream) + columns * GAMMA)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -uniform.log()
