"""What a search is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SECONDS = 300.0

RESERVE = 1.2
"""How far KL on another text of the same kind may be above that on the calibration text: of two draws of 16 windows the
second was above it in 0.6 % of cases, over 34 formats and mixes of the embedded model (docs/findings.md)."""


@dataclass(frozen=True)
class Ask:
    """The limit on KL in nats, about how many seconds a search may take, and the folder of the recipes found.

    ``max_kld`` is to hold on other text of the kind too; so on the calibration text a choice, mix or single format,
    stays within ``kld_limit``.
    """

    max_kld: float
    seconds: float
    folder: Path

    @property
    def kld_limit(self) -> float:
        return self.max_kld / RESERVE
