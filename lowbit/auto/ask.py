"""What a search is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SECONDS = 300.0


@dataclass(frozen=True)
class Ask:
    """The limit on KL in nats, about how many seconds a search may take, and the folder of the recipes found."""

    max_kld: float
    seconds: float
    folder: Path
