"""What ``python -m lowbit bisect OLD NEW`` prints: what moved, the suspects in order, and the first step."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lowbit.bisection import BLOCKING, Environment, Moved, Suspect, half_way, is_of_torch
from lowbit.pins import requirement
from lowbit.report.content import arguments_of
from lowbit.report.layout import count, hang
from lowbit.report.rows import selection

LISTED = 12
"""Of the suspects; ``pip freeze`` may differ in a hundred packages."""

NEWEST = ".lowbit/runs"
"""As ``compare`` reads it: of a folder of runs the newest."""


def suspects(old: Environment, new: Environment, moved: Moved, found: Sequence[Suspect]) -> str:
    """The whole text."""
    lines = [f"OLD  {_told(old)}", f"NEW  {_told(new)}", *_foreign(old, new), *_wrap(_moved(moved), "")]
    if not found:
        return "\n".join([*lines, "", *_unchanged(old, new)])
    first = found[0]
    lines += ["", *_wrap(f"bisect first: {_changes(first)}{': ' if first.why else ''}{first.why}", ""), ""]
    lines.append(f"what changed, nearest to {moved.metric or 'the figures'} first:")
    for number, one in enumerate(found[:LISTED], 1):
        between = f"between, by their numbers: {_few(one.between)}" if one.between else ""
        lines += _wrap(f"{number:>3}. " + "; ".join(filter(None, (_changes(one), one.why, between))), "     ")
    if len(found) > LISTED:
        lines.append(f"     and {len(found) - LISTED} more")
    return "\n".join([*lines, "", *_first_step(old, new, moved, found)])


def _told(environment: Environment) -> str:
    header = environment.header
    if header is None:
        return f"{environment.path}: {len(environment.pins)} pins"
    return f"{environment.path}: {header.model} ({header.load_format}) on {header.device}, {header.started}"


def _foreign(old: Environment, new: Environment) -> list[str]:
    """Said of two runs whose figures can't be held against each other: only their packages can."""
    if old.header is None or new.header is None or old.header.subject == new.header.subject:
        return []
    return _wrap(
        "they measured different things (device, model, load format or protocol): what follows compares their packages "
        "alone, and says nothing of what is slower",
        "",
    )


def _moved(moved: Moved) -> str:
    if not moved.cases:
        return "no case is known to be worse: kernel libraries first; --case and --metric say what is"
    cases = count(len(moved.cases), "case")
    if not moved.metric:
        return f"concerned: {cases}" + (f"; {moved.worst}" if moved.worst else "")
    others = ", ".join(f"{name} of {number}" for name, number in moved.others.items())
    return (
        f"worse: {moved.metric} of {cases}"
        + (f", by {moved.worst} at most" if moved.worst else "")
        + (f"; also {others}" if others else "")
    )


def _changes(suspect: Suspect) -> str:
    """Without the fifteen nvidia packages that torch brings, which are counted."""
    shown = [str(change) for change in suspect.changes if not is_of_torch(change.name)] or [suspect.name]
    more = len(suspect.changes) - len(shown)
    return ", ".join(shown) + (f" and {more} nvidia packages" if more else "")


def _few(versions: Sequence[str]) -> str:
    return ", ".join(versions) if len(versions) <= 6 else f"{', '.join(versions[:3])} … {versions[-1]}"


def _unchanged(old: Environment, new: Environment) -> list[str]:
    lines = ["no package, driver or source differs between the two: nothing to bisect there. What is left is the"]
    lines.append("machine (clocks, other processes, temperature): measure NEW again before anything else")
    return lines


def _first_step(old: Environment, new: Environment, moved: Moved, found: Sequence[Suspect]) -> list[str]:
    first = found[0]
    lines = [f"half way: OLD with NEW's {first.name}, in a copy of OLD's environment"]
    commands = half_way(old, found) or _by_hand(first, old, new)
    lines += [f"    {command}" for command in [*commands, *_measure(old, moved)]]
    names = [requirement(first.name, version) for version in first.between]
    if first.by_pip and names:
        lines += _wrap(f"moves there too: it is {first.name}; go on in the middle, {names[len(names) // 2]}", "")
    elif first.name == "torch" and len(first.changes) > 1:
        lines += _wrap(f"moves there too: it is torch or what comes with it ({first.changes[1].name})", "")
    else:
        lines += _wrap(f"moves there too: it is {first.name}", "")
    if len(found) > 1:
        lines += _wrap(f"does not: it is not; keep NEW's {first.name} and add NEW's {found[1].name}", "")
    return lines


def _by_hand(suspect: Suspect, old: Environment, new: Environment) -> list[str]:
    if suspect.name == "lowbit" and old.header and new.header and old.header.commit != new.header.commit:
        return [
            f"git bisect start {new.header.commit or 'NEW'} {old.header.commit or 'OLD'} -- lowbit benches",
        ]
    if suspect.name == "lowbit":
        return ["# check out the lowbit that NEW was measured with; the packages stay OLD's"]
    if suspect.name == BLOCKING:
        return ["unset CUDA_LAUNCH_BLOCKING"]
    return [f"# pip can't: a host or an image with {suspect.changes[0].name} {suspect.changes[0].new or 'none'}"]


def _measure(old: Environment, moved: Moved) -> list[str]:
    """The first of the worse cases alone, compared with OLD."""
    chosen = f" -k {shlex.quote(selection(moved.cases[0]))}" if moved.cases else ""
    if old.header is None:
        return [f"pytest benches --benchmark-compare{chosen}"]
    return [
        f"pytest benches {' '.join(arguments_of(old.header))}{chosen}",
        f"python -m lowbit compare {shlex.quote(str(old.path))} {NEWEST}",
    ]


def _wrap(text: str, indent: str) -> list[str]:
    return hang(text, indent or "    ").splitlines()
