"""Record: everything that is known about one measured case, to and from JSON. One test makes one record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lowbit.errors import LowbitError
from lowbit.formats import Unmet

SCHEMA = 1
Outcome = Literal["measured", "skipped", "failed", "void"]
Kind = Literal["prefill", "decode", "quality", "eval"]


@dataclass
class Record:
    """One case's result.

    ``case`` is the pytest node id (``benches/test_decode.py::test_decode[a16w4_g128-torchao-eager-b1_c0]``), the key
    by which baselines and runs are joined. ``metrics`` maps a metric's name (with its unit) to a float;
    ``unavailable`` maps the metrics that this case should have and hasn't to the reason. ``samples`` are the raw
    timings in seconds. ``outcome`` is ``void`` when the card was disturbed: a void record never regresses and never
    becomes a baseline. ``info`` is everything else: coverage, clocks, throttling, compile counters, and of a case that
    failed by a library's error ``raised_in``, the last of lowbit's own lines that it came by.
    """

    case: str
    kind: Kind
    format: str
    mode: str | None
    workload: str | None
    model: str
    load_format: str
    dtype: str = ""
    outcome: Outcome = "measured"
    unmet: Unmet | None = None
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def backend(self) -> str:
        return self.format.rsplit("-", 1)[-1]

    def to_dict(self, *, samples: bool = True) -> dict[str, Any]:
        """JSON-ready. ``samples=False`` drops the raw timings, as a baseline does."""
        data = asdict(self)
        data["unmet"] = list(self.unmet) if self.unmet else None
        if not samples:
            del data["samples"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """The inverse of ``to_dict``. Raises LowbitError on a foreign or newer schema."""
        try:
            if data["schema"] != SCHEMA:
                raise LowbitError(f"record {data.get('case')!r}: expected schema {SCHEMA}, got {data['schema']!r}")
            fields = {**data, "unmet": Unmet(*data["unmet"]) if data.get("unmet") else None}
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise LowbitError(f"not a lowbit record ({error}): {json.dumps(data, default=str)[:200]}") from error
