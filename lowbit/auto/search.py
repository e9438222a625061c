"""The search behind ``auto``: measure candidates part by part, mix the fastest within the limit, check it.

1. Screen: each candidate's KL on the calibration text as a whole model and per group of linears, and the seconds of one
   product of each shape. Half of the time is for this; what it has no time for is named.
2. Mix: the plan whose sums are the fastest within the limit (lowbit/auto/plan.py); its real KL is measured, with steps
   back while it is over.
3. Settle: the decode step of the mix is measured, and that of every single format within the limit that was not
   foreseen to be slower by more than MARGIN. The fastest is taken: no such single format beats the choice here.

Knows its device only as a Bench, so it is tested with made-up figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lowbit.auto import plan
from lowbit.auto.plan import Option, Plan
from lowbit.errors import LowbitError
from lowbit.faults import is_device_fault
from lowbit.formats import Format, auto

SCREENING = 0.5
"""Share of the time after which no further candidate is screened."""

MARGIN = 1.25
"""Seconds of all products over the least ones: beyond, a single format is not measured as a whole."""

NEGLIGIBLE = 0.01
"""Of the limit: a format whose whole model loses less is not scored group by group; each group counts the whole."""

Result = TypeVar("Result")


class Bench(Protocol):
    """What measures for a search, on one device and one model."""

    layers: int
    dtype: str
    """The base dtype of a mix."""

    def clock(self) -> float:
        """Seconds, from any beginning."""

    def mode(self, fmt: Format) -> str:
        """The compile mode that a format decodes in here. Raises LowbitError with the reason where it can't run."""

    def mixes(self, fmt: Format) -> bool:
        """Whether a format runs beside others: in the mode and base dtype of a mix."""

    def kld(self, fmt: Format) -> float:
        """Mean KL divergence from the base dtype on the calibration text, in nats."""

    def product_s(self, fmt: Format) -> Mapping[str, float]:
        """Seconds of one product at batch 1 in the base dtype of a mix, by the linear's name (head included)."""

    def step_s(self, fmt: Format) -> float:
        """Seconds of one decoded token in ``mode(fmt)``, batch 1, empty context."""


@dataclass
class Finalist:
    """What may be chosen: a single format, or the mix. ``foreseen_s`` are all its products, ``step_s`` a real step."""

    format: Format
    kld: float
    mode: str
    foreseen_s: float | None = None
    step_s: float | None = None


@dataclass
class Outcome:
    """What a search found. ``finalists`` are the formats within the limit; ``options`` what was known of each group;
    ``left_out`` the formats that dropped out, with the reason."""

    best: Finalist
    finalists: list[Finalist]
    options: dict[str, list[Option]]
    left_out: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0


class Search:
    """One search. ``rows`` in the order of their screening; ``known`` are all formats that a mix may name."""

    def __init__(
        self,
        bench: Bench,
        rows: Sequence[Format],
        known: Mapping[str, Format],
        *,
        max_kld: float,
        seconds: float,
        progress: Callable[[str], None],
    ) -> None:
        self.bench, self.rows, self.known = bench, rows, known
        self.max_kld, self.seconds, self.progress = max_kld, seconds, progress
        self.started = bench.clock()
        self.counts = {group: auto.counts(group, bench.layers) for group in auto.groups(bench.layers)}
        self.options: dict[str, list[Option]] = {group: [] for group in self.counts}
        self.finalists: list[Finalist] = []
        self.left_out: dict[str, str] = {}
        self.plain = known[auto.PLAIN[bench.dtype]]

    def run(self) -> Outcome:
        """Raises LowbitError if not even the base dtype can be measured here."""
        self._screen_plain()
        for number, row in enumerate(self.rows, 1):
            if self._elapsed() > SCREENING * self.seconds:
                self.left_out[row.id] = f"no time: {SCREENING * self.seconds:g} s of screening were over"
                continue
            self.progress(f"auto: {number} of {len(self.rows)} candidates: {row.id}")
            self._attempt(row, lambda row=row: self._screen(row))  # type: ignore[misc]
        self._mix()
        self._settle()
        measured = [one for one in self.finalists if one.step_s is not None]
        best = min(measured, key=lambda one: one.step_s or 0.0)
        return Outcome(best, self.finalists, self.options, self.left_out, self._elapsed())

    def _elapsed(self) -> float:
        return self.bench.clock() - self.started

    def _attempt(self, row: Format, call: Callable[[], Result]) -> Result | None:
        """None, and the reason kept, where a library fails: one format less. A CUDA fault ends the search."""
        try:
            return call()
        except Exception as error:
            if is_device_fault(error):
                raise
            told = (str(error).splitlines() or [""])[0]
            self.left_out[row.id] = told if isinstance(error, LowbitError) else f"{type(error).__name__}: {told}"
            return None

    # -- 1. screen ----------------------------------------------------------------------------------------------------

    def _screen_plain(self) -> None:
        times = self.bench.product_s(self.plain)
        self._offer(self.plain, dict.fromkeys(self.counts, 0.0), times)
        self.finalists.append(Finalist(self.plain, 0.0, self.bench.mode(self.plain), self._whole(self.plain, times)))

    def _screen(self, row: Format) -> None:
        mode = self.bench.mode(row)
        kld = self.bench.kld(row)
        mixes = self.bench.mixes(row)
        losses = self._losses(row, kld) if mixes else {}
        times = self.bench.product_s(row) if losses else {}
        self._offer(row, losses, times)
        if kld <= self.max_kld:
            self.finalists.append(Finalist(row, kld, mode, self._whole(row, times) if times else None))
        elif not losses:
            self.left_out[row.id] = f"KL {kld:.4g}, over the limit" + (" in every group of linears" if mixes else "")

    def _losses(self, row: Format, whole: float) -> dict[str, float]:
        """KL of each group alone in this format, where it is within the limit."""
        if whole <= NEGLIGIBLE * self.max_kld:
            return dict.fromkeys(self.counts, whole)
        found = {
            group: self.bench.kld(auto.mix("auto_probe", {group: row.id}, self.bench.dtype, self.known))
            for group in self.counts
        }
        return {group: kld for group, kld in found.items() if kld <= self.max_kld}

    def _offer(self, row: Format, losses: Mapping[str, float], times: Mapping[str, float]) -> None:
        for group, kld in losses.items():
            seconds = sum(count * times[name] for name, count in self.counts[group].items())
            self.options[group].append(Option(row.id, kld, seconds))

    def _whole(self, row: Format, times: Mapping[str, float]) -> float:
        """Seconds of all products of a model in this format; what it does not quantize is plain."""
        plain = {option.format: option.seconds for option in self.options["head"]}[self.plain.id]
        return sum(
            plain if name == "lm_head" and name not in row.targets else count * times[name]
            for counted in self.counts.values()
            for name, count in counted.items()
        )

    # -- 2. mix -------------------------------------------------------------------------------------------------------

    def _mix(self) -> None:
        plans = plan.front(self.options)
        tried = plan.fastest(plans, self.max_kld)
        while set(tried.formats.values()) != {self.plain.id}:
            fmt = self._recipe(tried)
            if fmt is None:
                return
            self.progress(f"auto: KL of the mix, foreseen {tried.kld:.4g}: {describe(tried.formats)}")
            kld = self._attempt(fmt, lambda fmt=fmt: self.bench.kld(fmt))  # type: ignore[misc]
            if kld is None:
                return
            if kld <= self.max_kld:
                self.finalists.insert(0, Finalist(fmt, kld, self.bench.mode(fmt), tried.seconds))
                return
            following = plan.step_back(plans, tried, kld, self.max_kld)
            if following == tried or self._elapsed() > self.seconds:
                self.left_out[fmt.id] = (
                    f"KL {kld:.4g}, over the limit; {'no time for' if following != tried else 'no'} step back"
                )
                return
            tried = following

    def _recipe(self, tried: Plan) -> Format | None:
        try:
            return auto.mix("auto_mix", tried.formats, self.bench.dtype, self.known, note=describe(tried.formats))
        except LowbitError as error:  # two libraries that want different values of one Inductor flag
            self.left_out["auto_mix-recipe"] = str(error)
            return None

    # -- 3. settle ----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Measure steps: of the mix, the single format foreseen to be the fastest, those not foreseen, the others."""
        foreseen = [one.foreseen_s for one in self.finalists if one.foreseen_s is not None]
        least = min(foreseen)
        singles = [one for one in self.finalists if not one.format.parts]
        singles.sort(key=lambda one: (one.foreseen_s is None, one.foreseen_s or 0.0))
        first, rest = singles[:1], sorted(singles[1:], key=lambda one: (one.foreseen_s or 0.0, one.format.weight_bits))
        mixes = [one for one in self.finalists if one.format.parts]
        for number, one in enumerate((*mixes, *first, *rest)):
            if one.foreseen_s is not None and one.foreseen_s > MARGIN * least and one not in first:
                self.left_out[one.format.id] = f"foreseen {one.foreseen_s / least:.2f} × the fastest's products"
            elif number >= len(mixes) + len(first) and self._elapsed() > self.seconds:
                self.left_out[one.format.id] = f"within the limit, but {self.seconds:g} s were over"
            else:
                self.progress(f"auto: a decoded token of {one.format.id}, {one.mode}")
                one.step_s = self._attempt(one.format, lambda one=one: self.bench.step_s(one.format))  # type: ignore[misc]
        if all(one.step_s is None for one in self.finalists):
            plain = next(one for one in self.finalists if one.format is self.plain)
            plain.step_s = self.bench.step_s(self.plain)


def describe(formats: Mapping[str, str]) -> str:
    """``q, kv, o a16w4_g128-torchao; ends bf16-torch``: groups by format."""
    named: dict[str, list[str]] = {}
    for group, name in formats.items():
        named.setdefault(name, []).append(group)
    return "; ".join(f"{', '.join(members)} {name}" for name, members in named.items())
