"""The commands on kept runs of many nights and hosts: ``python -m lowbit trend``, ``merge`` and ``bisect``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit import bisection, documents, history, merge, metrics, trend
from lowbit.changepoint import MIN_NIGHTS
from lowbit.errors import LowbitError, tell_left_out, unknown
from lowbit.history import History
from lowbit.report.layout import count
from lowbit.report.suspects import suspects
from lowbit.report.trends import trends
from lowbit.runs import Run
from lowbit.trend import Trend

OK, CHANGED = 0, 1
SHOWN = 20
"""Conflicts of a merge that are printed; the file names all."""
KEPT_RUNS = Path(".lowbit") / "runs"


def add_parsers(commands: Any) -> None:
    """The sub-commands of this module. ``commands`` is what ``ArgumentParser.add_subparsers`` gave."""
    _add_trend(commands)
    _add_merge(commands)
    _add_bisect(commands)


def _add_trend(commands: Any) -> None:
    parser = commands.add_parser("trend", help="what changed over the nights, since when, and what else did that night")
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help=f"kept runs, folders of some, merged files ({KEPT_RUNS})"
    )
    parser.add_argument("--history", type=Path, metavar="DIR", help="the same, by the name that `report` has for it")
    parser.add_argument("--device", metavar="SLUG", help="of this device alone, as in benches/baselines/<device>")
    parser.add_argument("--model", metavar="NAME", help="of this model alone, as the run's first line names it")
    parser.add_argument(
        "--nights", type=_positive, default=trend.NIGHTS, metavar="N", help=f"the last N runs ({trend.NIGHTS})"
    )
    parser.add_argument("--last", type=_positive, metavar="N", help="only what changed in the last N of them")
    parser.add_argument("--all", action="store_true", help="every case, however many moved alike in one night")
    parser.add_argument("--json", action="store_true", help="one object per device and model")
    parser.add_argument("--fail-on-change", action="store_true", help="exit code 1 when something listed got worse")
    parser.set_defaults(run=show_trends)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="kept runs of many hosts as one JSON; exit code 1 when they conflict")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="kept runs, or folders that hold some")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ALL.json", help="pytest-benchmark's JSON")
    parser.add_argument(
        "--device", metavar="SLUG", help="the runs of this device alone, e.g. to take them out of a merge"
    )
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="how these runs were made, kept with every case that ran"
    )
    parser.set_defaults(run=merge_runs)


def _add_bisect(commands: Any) -> None:
    parser = commands.add_parser("bisect", help="what changed between two environments, and which package to try first")
    what = "a kept run, a baseline, or the pins of one (`pip freeze`, constraints)"
    parser.add_argument("old", type=Path, metavar="OLD", help=f"the environment that was good: {what}")
    parser.add_argument("new", type=Path, metavar="NEW", help="the one that is worse")
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help="what is worse: part of a case's name (repeatable)"
    )
    parser.add_argument("--metric", default="", metavar="NAME", help="what it is worse by, e.g. decode_tok_s")
    parser.set_defaults(run=bisect_environments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def show_trends(options: argparse.Namespace) -> int:
    roots = [*options.runs, *([options.history] if options.history is not None else [])] or [KEPT_RUNS]
    read = history.read(*roots, device=options.device, model=options.model)
    for reason in read.unreadable:
        tell_left_out(reason)
    results = [_look(found, options.nights, options.last) for found in read.found]
    if options.json:
        print(json.dumps([_to_dict(found, listed) for found, listed in results], indent=1))
    else:
        print("\n\n".join(_to_text(found, listed, options.all) for found, listed in results))
    worse = any(one.worse is not False for _, listed in results for one in listed)
    return CHANGED if options.fail_on_change and worse else OK


def merge_runs(options: argparse.Namespace) -> int:
    paths = list(dict.fromkeys(found for path in options.runs for found in _found(path)))
    named = set(options.runs)
    kept: list[Run] = []
    broken = 0
    for path in paths:
        try:
            kept += merge.read(path)
        except LowbitError as error:
            if path in named:
                raise
            broken += 1  # one of a folder's: a task that was killed as it began costs itself
            tell_left_out(error)
    chosen = [run for run in kept if options.device in (None, run.header.device)]
    if not chosen:
        have = ", ".join(dict.fromkeys(run.header.device for run in kept)) or "no readable run"
        raise LowbitError(f"merge: expected kept runs{f' on {options.device}' if options.device else ''}, got {have}")
    merged = merge.merge([merge.noted(run, options.note) for run in chosen] if options.note else chosen)
    documents.write(options.output, merge.to_document(merged), "nothing was merged")
    for run in merged.runs:
        header = run.header
        unfinished = "" if run.complete else ", not all of them finished"
        print(
            f"{header.model} ({header.load_format}) on {header.device}: {count(len(run.entries), 'case')}{unfinished}"
        )
    print(f"{count(len(chosen), 'run')} merged into {options.output}")
    for conflict in merged.conflicts[:SHOWN]:
        print(f"conflict: {conflict}")
    if more := merged.conflicts[SHOWN:]:
        print(f"and {count(len(more), 'more conflict')}, named in {options.output} (lowbit.conflicts)")
    return CHANGED if merged.conflicts or broken else OK


def bisect_environments(options: argparse.Namespace) -> int:
    old, new = bisection.read(options.old), bisection.read(options.new)
    if options.metric and metrics.find(options.metric) is None:
        raise unknown("metric", options.metric, metrics.METRICS)
    moved = bisection.find_moved(old, new, options.case, options.metric)
    print(suspects(old, new, moved, bisection.find_suspects(old, new, moved)))
    return OK


def _found(path: Path) -> list[Path]:
    if not path.exists():
        raise LowbitError(f"{path}: no such kept run")
    found = list(merge.find(path))
    if not found:
        raise LowbitError(f"{path}: expected a kept run or a folder of some, got none")
    return found


def _look(found: History, nights: int, last: int | None) -> tuple[History, list[Trend]]:
    recent = replace(found, nights=found.nights[-nights:])
    first = 0 if last is None else len(recent.nights) - last
    return recent, [one for one in trend.find_trends(recent) if one.change.index >= first]


def _to_text(found: History, listed: list[Trend], everything: bool) -> str:
    text = trends(found, listed, everything=everything, color=sys.stdout.isatty())
    if len(found.nights) < MIN_NIGHTS:
        text += f" can be told from {count(len(found.nights), 'night')}; from {MIN_NIGHTS} on it can"
    return text


def _to_dict(found: History, listed: list[Trend]) -> dict[str, Any]:
    return {
        "device": found.device,
        "model": found.model,
        "load_format": found.load_format,
        "nights": [{"started": night.started, "run": str(night.path)} for night in found.nights],
        "changes": [one.to_dict() for one in listed],
    }
