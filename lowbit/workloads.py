"""Every workload of the suite, one row each: what is prefilled, what is decoded, at which batch and context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import unknown

Phase = Literal["prefill", "decode"]
Scale = Literal["small", "full"]

SMALL_MODEL_PARAMETERS = 100_000_000
"""Models below this get the ``small`` rows: a laptop's CPU ends them in seconds."""


@dataclass(frozen=True)
class Workload:
    """One row. Greedy, static KV cache, EOS ignored, token feedback and position update inside the timed region.

    ``prefill`` times one forward pass over ``batch`` prompts of ``prompt_tokens``. ``decode`` first prefills
    ``prompt_tokens`` (untimed for decode, reported as its ttft) and then times ``new_tokens`` dependent steps, so
    that step i attends to ``prompt_tokens + i`` cached tokens.
    """

    id: str
    phase: Phase
    batch: int
    prompt_tokens: int
    new_tokens: int
    scale: Scale
    suites: tuple[str, ...] = ("nightly", "full")

    @property
    def context_tokens(self) -> int:
        """Positions that the KV cache must hold."""
        return self.prompt_tokens + self.new_tokens


QUICK = ("quick", "nightly", "full")
FULL = ("full",)

WORKLOADS: tuple[Workload, ...] = (
    Workload("p512", "prefill", 1, 512, 0, "full", QUICK),
    Workload("p2048", "prefill", 1, 2048, 0, "full"),
    Workload("b1_c0", "decode", 1, 5, 128, "full", QUICK),
    Workload("b1_c2048", "decode", 1, 2048, 128, "full"),
    Workload("b8_c0", "decode", 8, 5, 128, "full"),
    Workload("b1_c128", "decode", 1, 128, 128, "full", FULL),
    Workload("b1_c128_n512", "decode", 1, 128, 512, "full", FULL),
    Workload("b1_c8192", "decode", 1, 8192, 128, "full", FULL),
    Workload("p128", "prefill", 1, 128, 0, "small", QUICK),
    Workload("p384", "prefill", 1, 384, 0, "small"),
    Workload("b1_c0", "decode", 1, 5, 32, "small", QUICK),
    Workload("b1_c384", "decode", 1, 384, 32, "small"),
    Workload("b8_c0", "decode", 8, 5, 32, "small"),
)

SUITES = ("quick", "nightly", "full")


def select(phase: Phase, suite: str, parameters: int) -> list[Workload]:
    """The rows of one phase that belong to a suite, for a model of this many parameters."""
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    scale: Scale = "small" if parameters < SMALL_MODEL_PARAMETERS else "full"
    return [row for row in WORKLOADS if row.phase == phase and row.scale == scale and suite in row.suites]
