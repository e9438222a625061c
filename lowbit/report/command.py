"""``python -m lowbit report``: kept runs or a baseline in; one HTML file and, if asked for, the summary out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.baselines import Baseline
    from lowbit.report.content import Content
    from lowbit.runs import Header, Run

OK = 0
KEPT_RUNS = Path(".lowbit") / "runs"
BASELINES = Path("benches") / "baselines"


def add_parser(commands: Any) -> None:
    """The sub-command. ``commands`` is what ``ArgumentParser.add_subparsers`` gave."""
    parser = commands.add_parser("report", help="one HTML file: verdict, Pareto plots, roofline, all cases, history")
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a kept run (folder, run.json, journal), a folder of some, or a baseline; of several runs of one "
        f"device and model the newest is shown, the others are history. Without any: the newest of {KEPT_RUNS}",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="report.html")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="the Markdown summary as well")
    parser.add_argument("--history", type=Path, default=KEPT_RUNS, metavar="DIR", help=f"kept runs ({KEPT_RUNS})")
    parser.add_argument(
        "--baseline", metavar="FILE|none", help="judge by this one (default: the device's accepted one)"
    )
    parser.add_argument("--baselines-dir", type=Path, default=BASELINES, metavar="DIR", help=str(BASELINES))
    parser.add_argument(
        "--quality",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="the KL of formats that the run did not score, from this one (with dummy weights: of the embedded model)",
    )
    parser.add_argument("--max-kld", type=float, default=0.05, metavar="NAT", help="limit of the recommendation (0.05)")
    parser.add_argument("--max-vram", type=float, metavar="MIB", help="limit of the recommendation (none)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from lowbit.report import files, markdown, page, scores

    content = gather(options)
    content = scores.with_quality(content, options.quality) if options.quality else content
    files.write_page(options.output, page.render(content))
    print(f"{markdown.headline(content)}\nwritten: {options.output} ({options.output.stat().st_size / 1e6:.2f} MB)")
    if options.summary is not None:
        files.write_summary(options.summary, markdown.summary(content))
        print(f"written: {options.summary}")
    return OK


def gather(options: argparse.Namespace) -> Content:
    """What is to be shown. Raises LowbitError for files of different subjects, and where there is nothing to show."""
    from lowbit import comparison, runs
    from lowbit.baselines import Baseline
    from lowbit.report import content, since

    limits = {"max_kld": options.max_kld, "max_vram_mib": options.max_vram}
    sides = [comparison.read(path) for path in options.runs] or [_newest(options.history)]
    shown = [side for side in sides if not isinstance(side, Baseline)]
    _refuse_mixed(sides)
    if not shown:
        if len(sides) > 1:
            raise LowbitError(f"{len(sides)} baselines and no run: name one of them, or a run to judge by it")
        told = content.of_baseline(sides[0], **limits)  # type: ignore[arg-type]
        return told
    shown.sort(key=lambda each: each.header.started)
    named = [side for side in sides if isinstance(side, Baseline)]
    baseline = named[-1] if named else find_baseline(shown[-1].header, options)
    told = content.of_run(shown[-1], baseline, **limits)
    folders = dict.fromkeys([options.history, *filter(runs.holds_runs, options.runs)])
    history, unreadable = since.read_history(list(folders), shown[-1], shown[:-1])
    for reason in unreadable:
        print(f"lowbit: left out of the history: {reason}", file=sys.stderr)
    return since.with_history(told, history)


def _newest(history: Path) -> Run:
    from lowbit import runs

    found = runs.newest(history)
    if found is None:
        raise LowbitError(f"{history}: no kept run to report on; make one with `pytest benches`, or name files")
    return found


def _refuse_mixed(sides: list[Run | Baseline]) -> None:
    subjects = dict.fromkeys(side.header.subject for side in sides)
    if len(subjects) > 1:
        listed = "; ".join(", ".join(subject) for subject in subjects)
        raise LowbitError(
            f"expected runs of one device, model, load format and protocol, got {listed}; write one report for each"
        )


def find_baseline(header: Header, options: argparse.Namespace) -> Baseline | None:
    """The one asked for, else the accepted one of this device and model, else None."""
    from lowbit import baselines

    if options.baseline == "none":
        return None
    if options.baseline is not None:
        return baselines.load(Path(options.baseline))
    path = baselines.find(options.baselines_dir, header.device, header.model, header.load_format)
    return baselines.load(path) if path is not None else None
