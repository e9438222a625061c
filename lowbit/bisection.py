"""Which package to bisect first: what changed between two environments, what is nearest to the metric that moved first.

A half-way environment is OLD with NEW's version of one suspect, and of what comes with it: when the metric moves there,
it is that one, and its versions are halved in turn; when it doesn't, it isn't, and the next one joins.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowbit import comparison, metrics, pins
from lowbit.baselines import Baseline
from lowbit.comparison import Side
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.pins import Change
from lowbit.runs import Header

JSON = (".json", ".jsonl")
BLOCKING = "cuda-launch-blocking"

LIBRARY, TORCH, BENEATH, MODEL, HARNESS, REST = "library", "torch", "beneath", "model", "harness", "rest"
"""Kinds of suspects: a format's kernels; torch and its compiler; driver, CUDA and what else pip can't install;
transformers; lowbit itself; everything else."""

NEARNESS: Mapping[str, tuple[str, ...]] = {
    "": (LIBRARY, TORCH, BENEATH, MODEL, HARNESS, REST),
    "quality": (LIBRARY, TORCH, MODEL, HARNESS, BENEATH, REST),
    "compile": (TORCH, LIBRARY, BENEATH, MODEL, HARNESS, REST),
}
"""Family of the metric → kinds, the nearest first. Speed and memory are "": kernels, then what launches them. A
driver hardly changes a perplexity; compile seconds are torch's own."""

FAMILIES = {
    **dict.fromkeys(("ppl", "kld", "top1", "ln_ppl_ratio", "kernel_rel_error", "bits_per_weight"), "quality"),
    **dict.fromkeys(("compile_s", "graph_breaks", "recompiles"), "compile"),
}

WEIGHTS = ("decode_tok_s", "ttft_ms", "ppl", "kld", "top1", "vram_peak_mib", "weights_mib", "compile_s")
"""Where several metrics got worse, the first of these is what is asked about."""

WITH = {
    **dict.fromkeys(("triton", "pytorch-triton", "triton-windows", "cuda"), "torch"),
    "tokenizers": "transformers",
}
"""What another package's release decides: they move together, and are told apart only when it was them."""

KINDS = {
    **dict.fromkeys(("torch", "triton", "pytorch-triton", "triton-windows"), TORCH),
    **dict.fromkeys(("driver", "cuda", "os", "python", BLOCKING), BENEATH),
    **dict.fromkeys(("transformers", "tokenizers", "safetensors", "accelerate"), MODEL),
    **dict.fromkeys(("lowbit", "lowbit-source"), HARNESS),
}

KERNELS = {"native": "lowbit", "lowbit": "lowbit", "reference": "lowbit", "tables": "lowbit"}
"""A format's backend → the package whose kernels it runs, where the names differ; torch's own formats have none."""

NOT_BY_PIP = ("driver", "cuda", "os", "python", "lowbit", "lowbit-source", BLOCKING)


@dataclass(frozen=True)
class Environment:
    """One of the two. ``header`` and ``side`` are those of a run or a baseline, None for a file of pins."""

    path: Path
    pins: Mapping[str, str]
    side: Side | None = None

    @property
    def header(self) -> Header | None:
        return self.side.header if self.side else None


@dataclass(frozen=True)
class Moved:
    """What got worse: cases, the weightiest metric by which any did, and in words how much the worst by. Without a
    metric the cases were lost, and ``worst`` is the first one's reason. ``others`` counts cases by further metrics."""

    cases: list[str] = field(default_factory=list)
    metric: str = ""
    worst: str = ""
    others: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Suspect:
    """What moves together. ``why`` says what it has to do with what moved; ``between`` are the leader's versions."""

    name: str
    kind: str
    changes: list[Change]
    why: str
    between: list[str] = field(default_factory=list)

    @property
    def by_pip(self) -> bool:
        return self.name not in NOT_BY_PIP


def read(path: Path) -> Environment:
    """Of a kept run, a baseline, or a file of pins. Raises LowbitError for anything else."""
    if path.is_dir() or path.suffix in JSON:
        side = comparison.read(path)
        return Environment(path, {pins.normalize(name): value for name, value in side.header.environment.items()}, side)
    return Environment(path, pins.read(path))


def find_moved(old: Environment, new: Environment, cases: Sequence[str] = (), metric: str = "") -> Moved:
    """What NEW did worse than OLD by the gate's limits; or what the caller says did: parts of case names, a metric.

    Nothing for pins, for runs of different things, and where nothing is beyond its limit. Raises LowbitError for
    ``cases`` that neither run has.
    """
    known = _cases(old.side) | _cases(new.side)
    if cases and known:
        named = [case for case in known if any(word in case for word in cases)]
        if not named:
            raise LowbitError(f"expected a part of a case that {old.path} or {new.path} has, got {', '.join(cases)}")
        return Moved(named, metric)
    if cases:  # of pins: the formats alone can be told
        return Moved(list(cases), metric)
    if not old.side or not new.side or old.side.header.subject != new.side.header.subject:
        return Moved([], metric)
    compared = comparison.compare(old.side, new.side)
    worse: dict[str, list[tuple[float, str]]] = {}
    for case, verdicts in compared.verdicts:
        for verdict in verdicts:
            if verdict.fails and metric in ("", verdict.metric):
                worse.setdefault(verdict.metric, []).append((abs(verdict.change_relative or 0.0), case))
    if not worse:
        return Moved(list(compared.lost), metric, next(iter(compared.lost.values()), ""))
    first = min(worse, key=lambda name: (_weight(name), -len(worse[name])))
    size, case = max(worse[first])
    words = f"{100 * size:.1f} % in {case.rpartition('::')[2].removeprefix('test_')}" if size else ""
    others = {name: len(cases) for name, cases in worse.items() if name != first}
    return Moved([case for _, case in worse[first]], first, words, others)


def _weight(metric: str) -> int:
    family = _family(metric)
    return WEIGHTS.index(family) if family in WEIGHTS else len(WEIGHTS)


def _cases(side: Side | None) -> dict[str, None]:
    if side is None:
        return {}
    return dict.fromkeys(side.rows if isinstance(side, Baseline) else side.entries)


def find_suspects(old: Environment, new: Environment, moved: Moved) -> list[Suspect]:
    """What changed, what is nearest to what moved first. Two sources of different kinds: of what both name alone."""
    changed = pins.changes(old.pins, new.pins, common=(old.side is None) != (new.side is None))
    leaders: dict[str, list[Change]] = {}
    there = {change.name for change in changed}
    for change in changed:
        leader = "torch" if is_of_torch(change.name) else WITH.get(change.name, change.name)
        leader = "lowbit" if change.name == "lowbit-source" else leader
        leaders.setdefault(leader if leader in there or leader == "lowbit" else change.name, []).append(change)
    users = _users(moved.cases)
    found = [
        _suspect(name, sorted(group, key=lambda one: _rank(name, one)), users, moved) for name, group in leaders.items()
    ]
    order = NEARNESS[FAMILIES.get(_family(moved.metric), "")]
    return sorted(found, key=lambda one: (_place(one, order, users, moved), one.name))


def is_of_torch(name: str) -> bool:
    """The CUDA libraries that torch's wheel asks for, ``nvidia-cublas-cu12``; NVML's binding is none of them."""
    return name.startswith("nvidia-") and name != "nvidia-ml-py"


def _family(metric: str) -> str:
    row = metrics.find(metric)
    return row.name if row else metric


def _place(suspect: Suspect, order: Sequence[str], users: Mapping[str, int], moved: Moved) -> float:
    """A library of some of the cases alone comes right behind torch, which all have; one of none is the rest."""
    if suspect.name == BLOCKING:
        return -1  # no timing under it is the card's own
    if suspect.kind != LIBRARY or not moved.cases:
        return order.index(suspect.kind)
    used = users.get(suspect.name, 0)
    if used == len(moved.cases):
        return order.index(LIBRARY)
    return max(order.index(TORCH), order.index(LIBRARY)) + 0.5 if used else order.index(REST)


def _rank(leader: str, change: Change) -> tuple[bool, bool, str]:
    """The leader, then what is named with it, then the rest (nvidia's packages)."""
    return change.name != leader, change.name not in WITH, change.name


def _suspect(name: str, group: list[Change], users: Mapping[str, int], moved: Moved) -> Suspect:
    kind = KINDS.get(name, LIBRARY if name in _libraries() else TORCH if is_of_torch(name) else REST)
    if users.get(name):
        kind = LIBRARY
    lead = group[0]
    return Suspect(name, kind, group, _why(kind, users.get(name, 0), moved), pins.between(lead.old, lead.new))


def _why(kind: str, used: int, moved: Moved) -> str:
    if kind == LIBRARY and moved.cases:
        several = f"{used} of the {len(moved.cases)} worse cases"
        every = "the worse case" if len(moved.cases) == 1 else f"all {len(moved.cases)} worse cases"
        return f"the kernels of {every if used == len(moved.cases) else several}" if used else "no worse case's kernels"
    return {
        LIBRARY: "a kernel library",
        TORCH: "runs and compiles every case",
        BENEATH: "beneath every case",
        MODEL: "the model's code",
        HARNESS: "what measures",
        REST: "",
    }[kind]


def _libraries() -> set[str]:
    return {name for fmt in FORMATS for name in libraries_of(fmt)} - {"lowbit"}


def libraries_of(format_id: str) -> set[str]:
    """The packages whose kernels a format runs: its library's, what its row needs besides; of a recipe, all parts'."""
    fmt = FORMATS.get(format_id)
    if fmt is None:  # of another version of lowbit
        backend = format_id.rpartition("-")[2]
        return {KERNELS.get(backend, backend)} if backend not in ("torch", "recipe", "") else set()
    if fmt.parts:
        return set().union(*(libraries_of(part) for part in fmt.parts.values()))
    own = set() if fmt.backend in ("torch", "recipe") else {KERNELS.get(fmt.backend, fmt.backend)}
    return own | {pins.normalize(name) for name in fmt.packages} - {"triton"}


def _users(cases: Iterable[str]) -> dict[str, int]:
    """Library → how many of the cases run its kernels."""
    counts: dict[str, int] = {}
    for case in cases:
        for name in libraries_of(format_of(case)):
            counts[name] = counts.get(name, 0) + 1
    return counts


def format_of(case: str) -> str:
    """The format's id in a case's name, ``…[a16w4_g128-torchao-eager-b1_c0]``; the name itself where there is none."""
    inner = re.sub(r"^.*\[|\].*$", "", case)
    words = inner.split("-")
    ids = ("-".join(words[:count]) for count in range(len(words), 0, -1))
    return next((candidate for candidate in ids if candidate in FORMATS), "-".join(words[:2]))


def half_way(old: Environment, suspects: Sequence[Suspect], at: int = 0) -> list[str]:
    """The commands that turn OLD's environment into itself with NEW's version of suspect ``at``; [] where pip can't."""
    suspect = suspects[at]
    if not suspect.by_pip:
        return []
    moved = [change for change in suspect.changes if change.name not in NOT_BY_PIP]
    wanted = [pins.requirement(change.name, change.new) for change in moved if change.new]
    gone = [change.name for change in moved if not change.new]
    options = list(dict.fromkeys(word for change in moved for word in pins.index_options(change.new)))
    if old.side is None:
        names = "|".join(re.escape(change.name).replace(r"\-", "[-_.]") for change in moved)
        written = [f"grep -viE '^({names}) *([@<>=~!;[]|$)' {old.path} > half.txt"]
        written += [f"printf '%s\\n' {' '.join(map(shlex.quote, wanted))} >> half.txt"] if wanted else []
        return [*written, " ".join(["pip install", *options, "-r half.txt"]), *_removed(gone)]
    kept = [
        pins.requirement(change.name, change.old)
        for other in suspects
        if other is not suspect and other.by_pip
        for change in other.changes
        if change.old and change.name not in NOT_BY_PIP
    ]
    install = [" ".join(["pip install", *options, *map(shlex.quote, [*wanted, *kept])])] if wanted else []
    return [*install, *_removed(gone)]


def _removed(names: Sequence[str]) -> list[str]:
    return [f"pip uninstall -y {' '.join(names)}"] if names else []
