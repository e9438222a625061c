"""``python -m lowbit plan``: a suite cut into parts that each end within a time limit, as commands.

Every case of the suite is in exactly one part; a format's cases stay together where they fit, so that it is quantized
once. A part that was cut short goes on with ``--resume``; ``python -m lowbit merge`` puts the parts' runs together.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import cases
from lowbit.cases import KINDS, SUITE_MODES, Case
from lowbit.errors import LowbitError, tell_left_out, unknown
from lowbit.formats import FORMATS
from lowbit.report.layout import count
from lowbit.typical import STARTUP_S, first_s, typical_s

if TYPE_CHECKING:
    from lowbit.device import Device

OK = 0

PLANNED = tuple(kind for kind in KINDS if kind != "eval")
"""The kinds that a suite has by itself: eval's tasks are asked for by name."""


@dataclass(frozen=True)
class Planned:
    """A case, the node id of its test, and the seconds that it will take: ``recorded`` ones or a guess."""

    case: Case
    nodeid: str
    seconds: float
    recorded: bool = False

    @property
    def name(self) -> str:
        """``test_decode[…]``: what ``-k`` looks into."""
        return self.nodeid.rpartition("::")[2]


@dataclass
class Part:
    """Cases for one command; ``seconds`` with its start."""

    seconds: float
    cases: list[Planned] = field(default_factory=list)

    def take(self, found: Sequence[Planned]) -> None:
        self.cases += found
        self.seconds += seconds_of(found)


def seconds_of(found: Iterable[Planned]) -> float:
    return sum(one.seconds for one in found)


def expect(
    suite: str,
    kinds: Iterable[str],
    parameters: int,
    device_kind: str,
    recorded_s: Mapping[str, float],
    is_skipped: Callable[[Case], bool] | None = None,
) -> list[Planned]:
    """The suite's cases in the order they run. What the device can't have takes no time: by ``is_skipped`` where it is
    at hand, else by the kinds of device that a row names."""
    skips = is_skipped or (lambda case: device_kind not in case.format.devices)
    found = []
    for kind in kinds:
        if kind not in PLANNED:
            raise unknown("kind of case", kind, PLANNED)
        for case in cases.enumerate_cases(kind, suite, parameters):
            nodeid = f"benches/test_{kind}.py::test_{kind}[{case.id}]"
            guess = 0.0 if skips(case) else typical_s(device_kind, kind, case.mode, case.format.id)
            found.append(Planned(case, nodeid, recorded_s.get(nodeid, guess), nodeid in recorded_s))
    return sorted(found, key=lambda one: cases.run_order(one.case))


def with_first(planned: Sequence[Planned], device_kind: str) -> list[Planned]:
    """Formats in running order: what the first case of each takes more is added to it, unless its time is a recorded
    one or it is skipped."""
    found, seen = [], set[str]()
    for one in planned:
        more = (
            0.0
            if one.recorded or not one.seconds or one.case.format.id in seen
            else first_s(device_kind, one.case.format, one.case.mode)
        )
        if one.seconds:
            seen.add(one.case.format.id)
        found.append(replace(one, seconds=one.seconds + more))
    return found


def split(planned: Sequence[Planned], limit_s: float, startup_s: float) -> list[Part]:
    """Parts within ``limit_s``, in running order: whole formats, else whole modes of one, else single cases.

    A case that is longer than the limit by itself has a part of its own. Raises LowbitError for a limit that a part's
    start alone takes.
    """
    if limit_s <= startup_s:
        raise LowbitError(f"expected parts longer than their start of {startup_s:.0f} s, got {limit_s:.0f} s")
    parts = [Part(startup_s)]

    def fits(found: Sequence[Planned]) -> bool:
        return parts[-1].seconds + seconds_of(found) <= limit_s

    def add(found: Sequence[Planned], finer: Sequence[str]) -> None:
        if not fits(found) and finer and startup_s + seconds_of(found) > limit_s:
            for _, members in groupby(found, key=lambda one: _key(one, finer[0])):
                add(list(members), finer[1:])
            return
        if not fits(found) and parts[-1].cases:
            parts.append(Part(startup_s))
        parts[-1].take(found)

    for _, members in groupby(planned, key=lambda one: _key(one, "format")):
        add(list(members), ("mode", "case"))
    return [part for part in parts if part.cases]


def _key(one: Planned, by: str) -> str:
    return {"format": one.case.format.id, "mode": str(one.case.mode), "case": one.nodeid}[by]


def expression(part: Sequence[Planned], every: Sequence[Planned]) -> str:
    """What ``-k`` needs to select these of all cases and no other: beginnings of names, as short as can be."""
    names, others = [one.name for one in part], {one.name for one in every} - {one.name for one in part}
    words: list[str] = []
    for one in part:
        if any(word in one.name for word in words):
            continue
        words.append(next(word for word in _words(one) if not any(word in other for other in others)))
    kept = [word for word in words if any(word in name for name in names)]
    return " or ".join(dict.fromkeys(kept))


def _words(one: Planned) -> list[str]:
    """Parts of its name, the widest first; brackets keep other formats out."""
    fmt, mode = one.case.format.id, one.case.mode
    if mode is None:
        return [f"[{fmt}]", one.name]
    return [f"[{fmt}-", f"[{fmt}-{mode}-", f"[{one.case.id}]", one.name]


# -- the command -------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """The sub-command. ``commands`` is what ``ArgumentParser.add_subparsers`` gave."""
    parser = commands.add_parser("plan", help="a suite in parts that each end within some minutes, as commands")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="kept runs or baselines with wall times")
    parser.add_argument("--suite", default="full", choices=tuple(SUITE_MODES))
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="of each part (10)")
    parser.add_argument("--kind", action="append", choices=PLANNED, help="only these cases; may be repeated")
    parser.add_argument("--mode", action="append", choices=SUITE_MODES["full"], help="only these compile modes")
    parser.add_argument("--workload", metavar="ID", help="only this one, such as b1_c0; quality is none")
    parser.add_argument("--model", default="auto", help="as in `pytest benches --model`")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="plan for such a device (default: this machine's)")
    parser.add_argument("--commands", action="store_true", help="nothing but the commands, one a line")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from lowbit import device, models

    here = device.detect()
    choice = models.choose(options.model, options.load_format, here)
    kind = options.device or here.kind
    kinds = [one for one in PLANNED if one in (options.kind or PLANNED)]
    recorded = recorded_seconds(options.runs, choice.name, kind)
    skips = _skips(here, choice.config) if options.device in (None, here.kind) else None
    every = expect(options.suite, kinds, choice.parameters, kind, recorded, skips)
    planned = with_first([one for one in every if _asked_for(one.case, options)], kind)
    if not planned:
        raise LowbitError("no case of this suite, kind, mode and workload: nothing to plan")
    parts = split(planned, 60 * options.minutes, STARTUP_S[kind])
    lines = commands_of(parts, every, options, kinds)
    if options.commands:
        print("\n".join(lines))
        return OK
    known = sum(one.recorded for one in planned)
    minutes = sum(part.seconds for part in parts) / 60
    print(
        f"{choice.name} on {kind}, suite {options.suite}, {', '.join(kinds)}: {count(len(planned), 'case')} in "
        f"{count(len(parts), 'part')}, about {minutes:,.0f} min "
        f"({count(known, 'case')} by stored runs, the others a guess)"
    )
    for number, (part, line) in enumerate(zip(parts, lines, strict=True), start=1):
        long = "" if part.seconds <= 60 * options.minutes else f", more than {options.minutes:g}: one case takes that"
        print(f"\npart {number}: {count(len(part.cases), 'case')}, about {part.seconds / 60:.1f} min{long}\n{line}")
    print(
        "\nCut short? The same command with --resume goes on. All parts as one: python -m lowbit merge RUN… -o ALL.json"
    )
    return OK


def _skips(here: Device, config: Any) -> Callable[[Case], bool]:
    """Whether a case can't run on this machine: by the needs of its row and of its compile mode."""
    from lowbit import backends, compilers

    rows = {row.id: backends.unmet(row, here, config) for row in FORMATS.values()}

    def skips(case: Case) -> bool:
        return rows[case.format.id] is not None or compilers.case_unmet(case, here) is not None

    return skips


def _asked_for(case: Case, options: argparse.Namespace) -> bool:
    there = case.workload is not None and case.workload.id == options.workload
    return (options.mode is None or case.mode in options.mode) and (options.workload is None or there)


def commands_of(
    parts: Sequence[Part], every: Sequence[Planned], options: argparse.Namespace, kinds: Sequence[str]
) -> list[str]:
    """``pytest benches/test_decode.py … -k "…"`` of each part."""
    words = ["pytest", *(f"benches/test_{kind}.py" for kind in kinds)]
    words += ["--model", options.model] if options.model != "auto" else []
    words += ["--load-format", options.load_format] if options.load_format != "auto" else []
    words += ["--suite", options.suite]
    start = shlex.join(words)
    if options.workload is None:
        return [f'{start} -k "{expression(part.cases, every)}"' for part in parts]
    last = f"-{options.workload}]"
    every = [one for one in every if one.name.endswith(last)]
    return [f'{start} -k "({expression(part.cases, every)}) and {last}"' for part in parts]  # no other has that end


def recorded_seconds(paths: Iterable[Path], model: str, device_kind: str) -> dict[str, float]:
    """Wall seconds by node id, of the latest of these runs of this model on such a device. A folder's run that can't be
    read is named on standard error."""
    from lowbit.report import figures

    sources = figures.read(paths, tell_left_out)
    found = [source for source in sources if source.header.model == model]
    found = [source for source in found if source.on_cpu == (device_kind == "cpu")]
    return {
        record.case: float(record.info["wall_s"])
        for source in sorted(found, key=lambda source: source.header.started)
        for record in source.records
        if "wall_s" in record.info
    }
