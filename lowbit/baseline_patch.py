"""A baseline patch: a diff that ``git apply`` takes and that accepts exactly the named cases into a committed baseline.

All other benchmarks keep their lines to the byte; of the file's own entries only the versions and dates change.
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowbit import baselines, documents
from lowbit.baselines import Baseline
from lowbit.runs import Entry, Header, Run

NO_NEWLINE = "\\ No newline at end of file\n"


@dataclass(frozen=True)
class Accepted:
    """What a patch accepts. ``entries``: the case as this run measured or skipped it; ``repeats``: the metrics of the
    fresh processes that measured it again; ``gone``: cases that no longer exist."""

    entries: Mapping[str, Entry]
    repeats: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    gone: Sequence[str] = ()

    @property
    def cases(self) -> list[str]:
        return [*self.entries, *self.gone]


def make(baseline: Baseline, header: Header, accepted: Accepted) -> str:
    """The whole patch of ``baseline.path``. A row is the median of the run and its repeats, by ``baselines.build``.

    Raises LowbitError for a metric that is not finite and for a baseline that is foreign or can't be read.
    """
    fresh = baselines.build(_as_runs(header, accepted))
    old = documents.read(baseline.path, "lowbit baseline")
    new = baselines.to_document(baselines.replace_rows(baseline, fresh, accepted.cases))
    committed = {row["fullname"]: row for row in old["benchmarks"]}
    chosen = set(accepted.cases)
    new["benchmarks"] = [
        row if row["fullname"] in chosen else committed.get(row["fullname"], row) for row in new["benchmarks"]
    ]
    return unified(baseline.path, baseline.path.read_text(encoding="utf-8"), documents.encode(new))


def _as_runs(header: Header, accepted: Accepted) -> list[Run]:
    """The run, and one more per repeat: what a baseline is built from."""
    first = Run(Path(), header, dict(accepted.entries))
    more = max(map(len, accepted.repeats.values()), default=0)
    repeated: list[dict[str, Entry]] = [{} for _ in range(more)]
    for case, measured in accepted.repeats.items():
        entry = accepted.entries[case]
        for entries, metrics in zip(repeated, measured, strict=False):
            entries[case] = Entry(replace(entry.record, metrics=dict(metrics)), None)
    return [first, *(Run(Path(), header, entries) for entries in repeated)]


def unified(path: Path, old: str, new: str) -> str:
    """A unified diff of one file, named relative to the top of its git repository; empty when nothing differs."""
    name = _name_in_repository(path)
    end = "\t" if " " in name else ""  # git reads a name with blanks up to a tab
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}{end}", f"b/{name}{end}"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n{NO_NEWLINE}" for line in lines)


def _name_in_repository(path: Path) -> str:
    """``benches/baselines/nvidia-h200/0001_….json``; relative to the working directory where there is no repository."""
    path = path.resolve()
    command = ["git", "-C", str(path.parent), "rev-parse", "--show-toplevel"]
    try:
        top = Path(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        top = Path.cwd()
    top = top.resolve()
    return (path.relative_to(top) if path.is_relative_to(top) else path).as_posix().lstrip("/")


def preface(lines: Iterable[str]) -> str:
    """What a person reads above the diff; git skips it. Indented, so that no line looks like a diff's own."""
    return "".join(f"  {line}\n" for text in lines for line in text.splitlines()) + "\n"
