"""compute-sanitizer over lowbit's own decode kernels, for who changes them; needs one GPU of SM90 and the tool:

    pip install nvidia-cuda-sanitizer-api==13.5.25      # compute-sanitizer 2026.4: site-packages/nvidia/cu13/bin
    python .ci/sanitize.py [--tool memcheck|racecheck] [--sanitizer PATH] [--jobs N] [SPEC ...]

Steps run on small shapes that use every stage of a ring again and again (.ci/sanitize_worker.py). memcheck sees the
kernels as they are shipped. racecheck sees them with edits (.ci/sanitize_edits.py): it follows neither a __syncwarp()
before one lane's arrival nor an acquire-release count (docs/kernels.md). Faults are planted as well, and each must be
found. SPEC: FORMAT[:batch[:kv[:length]]]; without any, every format and 2 to 8 sequences. Exit codes: 0 clean and every
fault found, 1 not so, 2 no tool or no such GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("sanitize_worker.py")
WHEEL = "nvidia-cuda-sanitizer-api==13.5.25"
FALLBACK = Path("/usr/local/cuda/bin/compute-sanitizer")
KERNELS = ("product", "batch", "attention", "embed", "normalize")
SPECS = (
    "int4_g128 bf16 ternary",
    "int8 fp8_e4m3 int2_g128",
    "mxfp4 nvfp4 int3_g128",
    "binary int4_g64 int4_g32",
    "int4_sym_g128 int4_sym_g64 int4_sym_g32",
    "int4_g128:8 bf16:2 int8:5",
    "fp8_e4m3:8 mxfp4:6 nvfp4:8",
    "int2_g128:7 ternary:8 int3_g128:4",
    "binary:8 int4_g64:4 int4_g32:3",
    "int4_sym_g128:8 int4_g128:1:fp8 int4_g128:1:fp8:1216 int8:4:int8:1216",
)
"""A process each."""
OPTIONS = {
    "memcheck": "--report-api-errors no --destroy-on-device-error kernel",
    "racecheck": "--racecheck-report analysis --num-cuda-barriers 192",
}
ENVIRONMENT = {
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else a tensor's end is its cache block's
    "racecheck": {"NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS": "1000000"},
}
EDITS = "lanes,handover"


class Process(NamedTuple):
    """One run of the tool. ``found_in``: the function in which a planted ``fault`` must be reported."""

    tool: str
    specs: tuple[str, ...] = ()
    fault: str = ""
    found_in: str = ""

    def __str__(self) -> str:
        return " ".join((self.tool, *((f"planted {self.fault}",) if self.fault else ()), *self.specs))


FAULTS = (
    Process("memcheck", (), "bounds", "embed_planted_embed_kernel"),
    Process("racecheck", (), "shared", "embed_planted_embed_kernel"),
    Process("racecheck", ("int4_g128",), "release", "bulk_copy"),
    Process("racecheck", ("int4_g128:8",), "release", "bulk_copy"),
    Process("racecheck", ("int4_g128:8",), "sums", "finish_tile"),
)


def processes(tools: Sequence[str], specs: Sequence[str] = ()) -> list[Process]:
    """What is run: ``specs`` or the default ones by each tool, then the tool's faults."""
    lists = [(spec,) for spec in specs] or [tuple(line.split()) for line in SPECS]
    return [*(Process(tool, one) for tool in tools for one in lists), *(one for one in FAULTS if one.tool in tools)]


def command(process: Process, sanitizer: str, number: int) -> list[str]:
    """Without its environment."""
    line = [sanitizer, "--tool", process.tool, "--port", str(49200 + 12 * number), "--print-limit", "200"]
    line += ["--show-backtrace", "device", "--require-cuda-init", "no"]
    for kernel in KERNELS:
        line += ["--kernel-name", f"kns={kernel}_kernel"]
    line += OPTIONS[process.tool].split()
    line += [sys.executable, str(WORKER)]
    if process.tool == "racecheck":
        line += ["--edits", EDITS, "--each"]
    if process.fault:
        line += ["--fault", process.fault]
    return [*line, *process.specs]


# -- what the tool said ------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """Of one process's output. ``errors``: None if the tool did not come to its summary."""

    errors: int | None
    checked: tuple[str, ...]
    places: Counter[str]  # what was reported where -> hazards or accesses
    last: str  # line


PLACE = re.compile(
    r"(?:(Read|Write|Atomic\w*) access )?\bat (.+?)(?:\+0x[0-9a-f]+)? in (?:\S*/)?([^\s/]+\.cu:\d+)(?: \[(\d+) haz)?"
)


def function_of(signature: str) -> str:
    """The name in a demangled signature: "void f<(int)2>(int &)" -> "f"."""
    found = re.search(r"(\w+)(?:<.*?>)?\(", signature)
    return found[1] if found else signature


def place_of(title: str, lines: Sequence[str]) -> tuple[str, int]:
    """One report: (accesses as "Write f a.cu:1 | Read g b.cu:2", or its title where none is named; how many)."""
    found = [match for line in (title, *lines) if (match := PLACE.search(line))]
    sides = dict.fromkeys(
        f"{kind or ''} {function_of(where)} {line}".strip()
        for kind, where, line, _ in (match.groups() for match in found)
    )
    what = (
        ""
        if "Race reported" in title
        else re.sub(r" at [A-Za-z_].*| of size \d+ bytes", "", title) + (": " if sides else "")
    )
    return what + " | ".join(sides), sum(int(match[4]) for match in found if match[4]) or 1


def read_report(text: str) -> Report:
    """What compute-sanitizer and the worker printed."""
    reports: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if found := re.match(r"=========( +)(\S.*)", line):
            if len(found[1]) == 1:
                reports.append((found[2], []))
            elif reports:
                reports[-1][1].append(found[2])
    summaries = [title for title, _ in reports if "SUMMARY:" in title]
    counted = re.findall(r"(\d+) (?:error|warning)s?\b", summaries[-1]) if summaries else []
    places: Counter[str] = Counter()
    for title, lines in reports:
        if "SUMMARY:" not in title and not title.startswith(("COMPUTE-SANITIZER", "Target application")):
            what, count = place_of(title, lines)
            places[what] += count
    checked = re.findall(r"^(?:checked|planted) (.+?): ", text, re.MULTILINE)
    own = [line for line in text.splitlines() if line.strip() and not line.startswith("=========")]
    return Report(sum(map(int, counted)) if summaries else None, tuple(checked), places, own[-1] if own else "")


def wrong(process: Process, report: Report, code: int) -> str:
    """Why this is not what a process must end as, or ""."""
    if report.errors is None:
        return f"no summary, exit code {code}: {report.last or 'no output'}"
    if process.fault:
        found = any(re.search(rf"\b{process.found_in}\b", place) for place in report.places)
        return "" if report.errors and found else f"the fault was not found in {process.found_in}: {report.last}"
    if report.errors:
        return f"{report.errors} reported"
    if code or set(report.checked) != set(process.specs):
        return f"exit code {code}, checked {', '.join(report.checked) or 'nothing'}: {report.last}"
    return "" if not report.places else "reported, but not counted"


# -- running it --------------------------------------------------------------------------------------------------------


def find_tool(given: str | None) -> str | None:
    """compute-sanitizer: as given, on PATH, or the toolkit's."""
    if given:
        return shutil.which(given)
    return shutil.which("compute-sanitizer") or shutil.which(FALLBACK)


def unmet_gpu() -> str | None:
    """Why the kernels can't run here, or None."""
    import torch

    from lowbit.kernels.geometry import NEEDED_SM

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = torch.cuda.get_device_capability()
    return (
        None
        if found == NEEDED_SM
        else f"the kernels are SM{NEEDED_SM[0]}{NEEDED_SM[1]}'s, this is SM{found[0]}{found[1]}"
    )


def run(line: Sequence[str], environment: dict[str, str], log: Path, limit_s: float) -> int:
    """The exit code of a command whose output goes to ``log``; -9 beyond ``limit_s``, when all it started is ended."""
    with log.open("wb") as to:
        started = subprocess.Popen(line, stdout=to, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            return started.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            return started.wait()


class Runs:
    """Processes, each with its log in ``logs``; told as they end."""

    def __init__(self, asked: Sequence[Process], lines: Sequence[list[str]], logs: Path, limit_s: float) -> None:
        self.asked, self.lines, self.logs, self.limit_s = asked, lines, logs, limit_s
        self.paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def one(self, number: int) -> bool:
        """Whether this process ended as it must."""
        process, started, log = self.asked[number], time.monotonic(), self.logs / f"{number:02d}.txt"
        environment = {**os.environ, **ENVIRONMENT[process.tool], "PYTHONPATH": self.paths, "PYTHONUNBUFFERED": "1"}
        code = run(self.lines[number], environment, log, self.limit_s)
        report = read_report(log.read_text(errors="replace"))
        why = wrong(process, report, code)
        ended = why or (f"found in {process.found_in}" if process.fault else "0 errors")
        told = [f"{'FAILED' if why else 'ok':6} {process}: {ended}; {time.monotonic() - started:.0f} s, {log.name}"]
        told += [f"    {count} x {place}" for place, count in report.places.most_common(8)]
        print("\n".join(told), flush=True)
        return not why

    def all(self, jobs: int) -> bool:
        with ThreadPoolExecutor(jobs) as pool:
            good = list(pool.map(self.one, range(len(self.asked))))
        ended = list(zip(self.asked, good, strict=True))
        clean, found = ([ok for one, ok in ended if bool(one.fault) is planted] for planted in (False, True))
        print(f"{sum(clean)} of {len(clean)} processes clean, {sum(found)} of {len(found)} planted faults found")
        return all(good)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--tool", choices=[*OPTIONS], help="one of the two alone")
    parser.add_argument("--sanitizer", metavar="PATH", help="compute-sanitizer, if not the one on PATH")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes at once"
    )
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="seconds for one process")
    parser.add_argument("--logs", type=Path, help="folder for the tool's own words")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    given = parser.parse_args(arguments)
    asked = processes([given.tool] if given.tool else [*OPTIONS], given.specs)
    tool = find_tool(given.sanitizer)
    lines = [command(one, tool or "compute-sanitizer", number) for number, one in enumerate(asked)]
    if given.dry_run:
        for one, line in zip(asked, lines, strict=True):
            variables = {"PYTHONPATH": str(ROOT), **ENVIRONMENT[one.tool]}
            print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *line]))
        return 0
    if tool is None:
        where = given.sanitizer or f"compute-sanitizer on PATH, nor {FALLBACK}"
        print(f"there is no {where}: pip install {WHEEL}, then --sanitizer PATH", file=sys.stderr)
        return 2
    if (why := unmet_gpu()) is not None:
        print(f"the decode kernels can't run here: {why}; tests/test_emulated*.py run them on a CPU", file=sys.stderr)
        return 2
    logs = given.logs or Path(tempfile.mkdtemp(prefix="lowbit-sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")
    print(
        f"{tool}: {next((line for line in version if 'ersion' in line), 'tells no version')}; logs in {logs}",
        flush=True,
    )
    return 0 if Runs(asked, lines, logs, given.limit).all(given.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
