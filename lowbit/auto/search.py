"""The search behind ``auto``: measure candidates part by part, mix the fastest within the limit, check it.

Formats mix on a ground: a compile mode and base dtype that they share. There are two at most: lowbit's own kernels,
whose whole step is one graph (mode native), and the compiled step of all the others.

1. Screen: each candidate's KL on the calibration text as a whole model and per group of linears, and the seconds of one
   product of each shape. Half of the time is for this; what it has no time for is named. On the native ground, which
   is screened first, products are timed in the whole model, and so is its step: nothing is compiled for it.
2. Mix, on each ground: the plan whose sums are the fastest within the limit (lowbit/auto/plan.py); its real KL is
   measured, with steps back while it is over.
3. Settle: the decode step of the mixes is measured, and that of every single format within the limit that was not
   foreseen to be slower by more than MARGIN. The fastest is taken: no such single format beats the choice here.

Knows its device only as a Bench, so it is tested with made-up figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lowbit.auto import plan
from lowbit.auto.ground import Ground, Side, Timed, describe
from lowbit.auto.plan import Option, Plan
from lowbit.errors import LowbitError
from lowbit.faults import is_device_fault
from lowbit.formats import Format, auto

SCREENING = 0.5
"""Share of the time after which no further candidate is screened."""

MARGIN = 1.25
"""Seconds of all products over the least ones on the same ground, or over the best step measured: beyond, what is
foreseen to be so slow is not measured as a whole."""

NEGLIGIBLE = 0.01
"""Of the limit: a format whose whole model loses less is not scored group by group; each group counts the whole."""

Result = TypeVar("Result")


class Bench(Protocol):
    """What measures for a search, on one device and one model."""

    layers: int
    grounds: Sequence[Ground]
    """One of them is not ``whole``: its base dtype is what KL is taken from."""

    def clock(self) -> float:
        """Seconds, from any beginning."""

    def mode(self, fmt: Format) -> str:
        """The compile mode that a format decodes in here. Raises LowbitError with the reason where it can't run."""

    def mixes(self, fmt: Format, ground: Ground) -> bool:
        """Whether a format runs beside others there."""

    def kld(self, fmt: Format) -> float:
        """Mean KL divergence from the base dtype on the calibration text, in nats."""

    def probe_kld(self, fmt: Format) -> float:
        """The same on a few windows of it: enough to plan by, not to choose by."""

    def timed(self, fmt: Format, ground: Ground) -> Timed:
        """What its products cost there."""

    def step_s(self, fmt: Format) -> float:
        """Seconds of one decoded token in ``mode(fmt)``, batch 1, empty context."""


@dataclass
class Finalist:
    """What may be chosen: a single format, or a mix. ``foreseen_s`` are all its products, ``step_s`` a real step."""

    format: Format
    kld: float
    mode: str
    foreseen_s: float | None = None
    step_s: float | None = None


@dataclass
class Outcome:
    """What a search found. ``finalists`` are the formats within the limit; ``options`` what was known of each group, by
    the ground's mode; ``left_out`` the formats that dropped out, with the reason."""

    best: Finalist
    finalists: list[Finalist]
    options: dict[str, dict[str, list[Option]]]
    left_out: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0


class Search:
    """One search. ``rows`` in the order of their screening; ``known`` are all formats that a mix may name; ``max_kld``
    holds on the calibration text (Ask.kld_limit)."""

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
        self.sides = [Side(ground, bench.layers) for ground in bench.grounds]
        self.finalists: list[Finalist] = []
        self.left_out: dict[str, str] = {}
        self.base = next(side for side in self.sides if not side.ground.whole)
        self.plain = known[auto.PLAIN[self.base.ground.dtype]]

    def run(self) -> Outcome:
        """Raises LowbitError if not even the base dtype can be measured here."""
        native = [side.ground for side in self.sides if side.ground.whole]
        early = [row for row in self.rows if any(self.bench.mixes(row, ground) for ground in native)]
        self._screen_all(early, 1)
        self._screen_plain()
        self._screen_all([row for row in self.rows if row not in early], 1 + len(early))
        for side in self.sides:
            self._mix(side)
        self._settle()
        measured = [one for one in self.finalists if one.step_s is not None]
        best = min(measured, key=lambda one: one.step_s or 0.0)
        options = {side.ground.mode: side.options for side in self.sides}
        return Outcome(best, self.finalists, options, self.left_out, self._elapsed())

    def _screen_all(self, rows: Sequence[Format], first: int) -> None:
        for number, row in enumerate(rows, first):
            if self._elapsed() > SCREENING * self.seconds:
                self.left_out[row.id] = f"no time: {SCREENING * self.seconds:g} s of screening were over"
                continue
            self.progress(f"auto: {number} of {len(self.rows)} candidates: {row.id}")
            self._attempt(row, lambda row=row: self._screen(row))  # type: ignore[misc]

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
        times = self.bench.timed(self.plain, self.base.ground).product_s
        self.base.offer(self.plain, dict.fromkeys(self.base.counts, 0.0), times)
        whole = self.base.whole_s(self.plain, times)
        self.finalists.append(Finalist(self.plain, 0.0, self.bench.mode(self.plain), whole))

    def _screen(self, row: Format) -> None:
        mode = self.bench.mode(row)
        kld = self.bench.kld(row)
        side = next((side for side in self.sides if self.bench.mixes(row, side.ground)), None)
        losses = self._losses(row, kld, side) if side else {}
        one = Finalist(row, kld, mode)
        if side and losses:
            timed = self.bench.timed(row, side.ground)
            side.offer(row, losses, timed.product_s)
            one.foreseen_s, one.step_s = side.whole_s(row, timed.product_s), timed.step_s
        if kld <= self.max_kld:
            self.finalists.append(one)
        elif not losses:
            self.left_out[row.id] = f"KL {kld:.4g}, over the limit" + (" in every group of linears" if side else "")

    def _losses(self, row: Format, whole: float, side: Side) -> dict[str, float]:
        """KL of each group alone in this format, where it is within the limit."""
        if whole <= NEGLIGIBLE * self.max_kld:
            return dict.fromkeys(side.counts, whole)
        found = {group: self.bench.probe_kld(side.probe(group, row, self.known)) for group in side.counts}
        return {group: kld for group, kld in found.items() if kld <= self.max_kld}

    # -- 2. mix -------------------------------------------------------------------------------------------------------

    def _mix(self, side: Side) -> None:
        name = f"{side.ground.mix}-recipe"
        if missing := [group for group, options in side.options.items() if not options]:
            self.left_out[name] = f"no format measured is within the limit for {', '.join(missing)}"
            return
        plans = plan.front(side.options)
        tried = plan.fastest(plans, self.max_kld)
        while tried is not None and not self._is_single(tried, side):
            kld = self._tried_kld(tried, side)
            if kld is None or kld <= self.max_kld:
                return
            following = plan.step_back(plans, tried, kld, self.max_kld)
            if following in (None, tried) or self._elapsed() > self.seconds:
                ended = "no" if following in (None, tried) else "no time for"
                self.left_out[name] = f"KL {kld:.4g}, over the limit; {ended} step back"
                return
            tried = following
        if tried is None:
            self.left_out[name] = f"KL of {min(one.kld for one in plans):.4g} at least is foreseen, over the limit"

    def _is_single(self, tried: Plan, side: Side) -> bool:
        """Whether the plan is a row that is among the finalists anyway."""
        names = set(tried.formats.values())
        if not side.ground.whole:
            return names == {self.plain.id}
        return len(names) == 1 and any(one.format.id in names for one in self.finalists)

    def _tried_kld(self, tried: Plan, side: Side) -> float | None:
        """The real KL of a plan, which is a finalist now if that is within the limit; None where it can't be had."""
        try:
            fmt = side.recipe(tried, self.known)
        except LowbitError as error:
            self.left_out[f"{side.ground.mix}-recipe"] = str(error)
            return None
        self.progress(f"auto: KL of the mix, foreseen {tried.kld:.4g}: {describe(tried.formats)}")
        kld = self._attempt(fmt, lambda: self.bench.kld(fmt))
        if kld is not None and kld <= self.max_kld:
            self.finalists.insert(0, Finalist(fmt, kld, self.bench.mode(fmt), tried.seconds))
        return kld

    # -- 3. settle ----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Measure steps: of the mixes, the single format foreseen to be the fastest, those not foreseen, the others."""
        singles = [one for one in self.finalists if not one.format.parts]
        singles.sort(key=lambda one: (one.foreseen_s is None, one.foreseen_s or 0.0))
        first, rest = singles[:1], sorted(singles[1:], key=lambda one: (one.foreseen_s or 0.0, one.format.weight_bits))
        mixes = sorted((one for one in self.finalists if one.format.parts), key=lambda one: one.foreseen_s or 0.0)
        for number, one in enumerate((*mixes, *first, *rest)):
            if one.step_s is not None:
                continue
            if one not in first and (slow := self._slow(one)):
                self.left_out[one.format.id] = slow
            elif number >= len(mixes) + len(first) and self._elapsed() > self.seconds:
                self.left_out[one.format.id] = f"within the limit, but {self.seconds:g} s were over"
            else:
                self.progress(f"auto: a decoded token of {one.format.id}, {one.mode}")
                one.step_s = self._attempt(one.format, lambda one=one: self.bench.step_s(one.format))  # type: ignore[misc]
        if all(one.step_s is None for one in self.finalists):
            plain = next(one for one in self.finalists if one.format is self.plain)
            plain.step_s = self.bench.step_s(self.plain)

    def _slow(self, one: Finalist) -> str | None:
        """Why a finalist need not be measured as a whole, or None."""
        if one.foreseen_s is None:
            return None
        alike = [other.foreseen_s for other in self.finalists if other.mode == one.mode and other.foreseen_s]
        if one.foreseen_s > MARGIN * min(alike, default=one.foreseen_s):
            return f"foreseen {one.foreseen_s / min(alike):.2f} × the fastest's products"
        steps = [other.step_s for other in self.finalists if other.step_s is not None]
        if steps and one.foreseen_s > MARGIN * min(steps):
            return f"its products alone are foreseen to take {one.foreseen_s / min(steps):.2f} × the best whole step"
        return None
