"""``python -m lowbit formats --markdown``: docs/formats.md, made of the stored runs and baselines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from lowbit.errors import LowbitError, tell_left_out

STORED = (Path("benches") / "baselines", Path("docs") / "runs")
"""What the repository holds: accepted baselines, and runs that are figures of no baseline (quality on a CPU)."""

OK = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The page's options, beside those of ``formats`` itself."""
    parser.add_argument("--markdown", action="store_true", help="every row with its measured figures: docs/formats.md")
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="with --markdown: kept runs, baselines or folders of some, beside the "
        f"stored ones ({' and '.join(map(str, STORED))}); the latest measurement of a case counts",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="with --markdown: write it there")


def is_asked_for(options: argparse.Namespace) -> bool:
    """Raises LowbitError for the page's arguments without it."""
    if not options.markdown and (options.runs or options.output):
        raise LowbitError("formats: RUN and -o belong to the page: give --markdown too")
    if options.markdown and options.json:
        raise LowbitError("formats: --markdown is a page, --json a list: give one of them")
    return bool(options.markdown)


def write(options: argparse.Namespace) -> int:
    from lowbit.report import files

    page = render(options.runs)
    if options.output is None:
        sys.stdout.write(page)
    else:
        files.write_page(options.output, page)
        print(f"written: {options.output}")
    return OK


def render(named: Iterable[Path] = ()) -> str:
    """The page of what the repository stores, and of the ``named`` runs beside it. Raises LowbitError for no run;
    a run in a named folder that can't be read is told on standard error."""
    from lowbit import backends
    from lowbit.formats import FORMATS
    from lowbit.report import figures, format_table

    stored = [found for path in STORED if path.exists() for found in _of_repository(path)]
    sources = figures.read(dict.fromkeys(stored))
    more = [path for path in dict.fromkeys(named) if path not in (*STORED, *stored)]
    sources += figures.read(more, tell_left_out)
    return format_table.page(
        list(FORMATS.values()), sources, {name: backends.needs(row) for name, row in FORMATS.items()}
    )


def _of_repository(path: Path) -> list[Path]:
    """What is to be read of a stored folder. A CPU's baseline is its owner's: its seconds say nothing of formats."""
    if not any(path.glob("cpu-*/")):
        return [path]
    return [found for found in sorted(path.iterdir()) if found.is_dir() and not found.name.startswith("cpu-")]
