"""``python -m lowbit`` and the ``lowbit`` command: what runs here (formats, models), and compare two runs offline.

Exit codes: 0 fine, 1 NEW is worse than OLD (compare) or standard output can't be written, 2 unusable input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import __version__, nightly, plan, step_command
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, Unmet
from lowbit.report import command, formats_page

if TYPE_CHECKING:
    from lowbit.device import Device

OK, WORSE, UNUSABLE = 0, 1, 2
UNWRITABLE = 1
INTERRUPTED = 130  # as a shell counts SIGINT
MIB = 1024 * 1024


class Commands:
    """The sub-commands: the line that the overview has for one also opens its own --help."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self.action.add_parser(name, help=help, description=help)
        return parser


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbit",
        description="Low-bit Llama formats on this machine. The measuring itself is `pytest benches`.",
        epilog="exit codes: 0 fine, 1 worse (compare, trend --fail-on-change) or in conflict (merge), 2 unusable "
        "input, 130 Ctrl-C",
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    commands = Commands(parser.add_subparsers(title="commands", dest="command", metavar="COMMAND"))

    formats = commands.add_parser("formats", help="what runs here, what doesn't, and why")
    formats.add_argument("--model", default="auto", help="for this model's shapes, as in `pytest benches --model`")
    formats.add_argument("--json", action="store_true", help="one object per format")
    formats_page.add_arguments(formats)
    formats.set_defaults(run=list_formats)

    models = commands.add_parser("models", help="the presets: shape, size, whether they fit this device, cached or not")
    models.add_argument("--json", action="store_true", help="one object per preset")
    models.set_defaults(run=list_models)

    compare = commands.add_parser("compare", help="judge NEW by OLD; exit code 1 when it is worse")
    compare.add_argument(
        "old", type=Path, metavar="OLD", help="a kept run, a folder of some (the newest), or a baseline"
    )
    compare.add_argument("new", type=Path, metavar="NEW", help="the same: .lowbit/runs is your last run")
    compare.set_defaults(run=compare_files)
    nightly.add_parsers(commands)
    plan.add_parser(commands)
    step_command.add_parser(commands)
    command.add_parser(commands)
    return parser


class OutputRefused(Exception):
    """Standard output took no more; its cause is the OSError."""


class Output:
    """Standard output whose refusals can be told from those of any other file: an OSError leaves as OutputRefused.

    A reader that has what it wants (``lowbit compare OLD NEW | head``) is no error: the command goes on unheard, and
    ends with its own exit code.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            # what is buffered, and what is still to come, goes nowhere: else the interpreter's end would complain
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OutputRefused from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Where what it prints can't be written (a full disk) that is one line on standard error and exit
    code 1."""
    output: Any = Output(sys.stdout)
    try:
        with redirect_stdout(output):
            try:
                return run(arguments)
            finally:
                output.flush()
    except OutputRefused as refused:
        print(
            f"lowbit: error: standard output can't be written ({refused.__cause__}), so what is there is not whole; "
            "free space, or send it elsewhere",
            file=sys.stderr,
        )
        return UNWRITABLE


def run(arguments: Sequence[str] | None) -> int:
    """One command. A LowbitError becomes one line on standard error and exit code 2, as argparse's errors do. Without
    a command: the overview, and the same exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return UNUSABLE
    try:
        exit_code: int = options.run(options)
    except LowbitError as error:
        print(f"lowbit: error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("lowbit: interrupted", file=sys.stderr)
        return INTERRUPTED
    return exit_code


def list_formats(options: argparse.Namespace) -> int:
    if formats_page.is_asked_for(options):
        return formats_page.write(options)
    from lowbit import backends, device, models
    from lowbit.report.layout import Heading, beside, fill, lay_out

    here = device.detect()
    choice = models.choose(options.model, "auto", here)
    rows = [(fmt, backends.unmet(fmt, here, choice.config)) for fmt in FORMATS.values()]
    if options.json:
        print(json.dumps([describe_format(fmt, unmet, here) for fmt, unmet in rows], indent=1))
        return OK
    runs = [fmt for fmt, unmet in rows if unmet is None]
    print(f"{here.name}, {choice.name}: {len(runs)} of {len(rows)} formats run here\n")
    titles = ("format", "group", "dtype", "kernel", "suite", "needs")
    table = [
        [
            fmt.id,
            str(fmt.group_size or ""),
            here.dtype_for(fmt) or "",
            "fast" if fmt.fast else "reference",
            fmt.suite,
            backends.needs(fmt),
        ]
        for fmt in runs
    ]
    lines = lay_out([Heading(title, right=title == "group") for title in titles], table, shorten=False)
    # a word of the id selects by itself: only the others need telling
    words = [", ".join(word for word in dict.fromkeys(fmt.keywords) if word not in fmt.id) for fmt in runs]
    print("\n".join(beside(lines, ["also with -k", *words])))
    groups: dict[str, list[str]] = {}
    for fmt, unmet in rows:
        if unmet is not None:
            groups.setdefault(str(unmet), []).append(fmt.id)
    if groups:
        print("\nnot here:")
    for reason, ids in groups.items():
        print(fill(", ".join(ids), "  ") + "\n" + fill(reason, "    "))
    return OK


def describe_format(fmt: Format, unmet: Unmet | None, here: Device) -> dict[str, Any]:
    """One object of ``formats --json``: the row, and whether and in which base dtype it runs on this device."""
    from lowbit import backends

    return {
        "id": fmt.id,
        "name": fmt.name,
        "backend": fmt.backend,
        "activation_bits": fmt.activation_bits,
        "weight_bits": fmt.weight_bits,
        "group_size": fmt.group_size,
        "dtype": here.dtype_for(fmt),
        "fast": fmt.fast,
        "suite": fmt.suite,
        "needs": backends.needs(fmt),
        "note": fmt.note,
        "runs": unmet is None,
        "kind": unmet.kind if unmet else None,
        "reason": unmet.reason if unmet else None,
        "selectors": sorted(fmt.selectors),
    }


def list_models(options: argparse.Namespace) -> int:
    from lowbit import device, models
    from lowbit.report.layout import Heading, lay_out

    here = device.detect()
    rows = [describe_model(name, here) for name in models.PRESETS]
    if options.json:
        print(json.dumps(rows, indent=1))
        return OK
    headings = [
        *(Heading("model", right=False), Heading("parameters"), Heading("bf16", "MiB")),
        *(Heading("layers"), Heading("hidden"), Heading("heads", "q/kv")),
        *(Heading("bf16 fits", "the card" if here.kind == "cuda" else "memory"), Heading("weights", right=False)),
    ]
    table = [
        [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['bf16_mib']:,.0f}",
            str(row["layers"]),
            str(row["hidden"]),
            f"{row['heads']}/{row['kv_heads']}",
            "yes" if row["fits"] else "no",
            row["weights"],
        ]
        for row in rows
    ]
    print("\n".join(lay_out(headings, table)))
    choice = models.choose("auto", "auto", here)
    print(f"\nauto takes {choice.name}, load format {choice.load_format}: {choice.why}")
    return OK


def describe_model(name: str, here: Device) -> dict[str, Any]:
    """One object of ``models --json``. ``fits``: bf16 weights within the card's memory, or the host's without one."""
    from lowbit import hub, models

    preset = models.PRESETS[name]
    choice = models.choose(name, "dummy", here)
    config, total = choice.config, here.total_mib or host_mib()
    mib = 2 * choice.parameters / MIB
    if preset.hub_id is None:
        weights = "in the package"
    elif hub.find_cached((preset.hub_id,), hub.cache_folder(os.environ)):
        weights = f"{preset.hub_id}, in the local cache"
    else:
        weights = f"{preset.hub_id}, not cached"
    return {
        "name": name,
        "hub_id": preset.hub_id,
        "parameters": choice.parameters,
        "bf16_mib": mib,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "fits": mib + (models.ROOM_MIB if here.kind == "cuda" else 0) <= total,
        "weights": weights,
    }


def host_mib() -> float:
    """This machine's memory in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def compare_files(options: argparse.Namespace) -> int:
    from lowbit.comparison import compare_runs
    from lowbit.report.difference import difference

    comparison = compare_runs(options.old, options.new)
    print(difference(comparison, color=sys.stdout.isatty()))
    return WORSE if comparison.failed else OK


if __name__ == "__main__":
    sys.exit(main())
