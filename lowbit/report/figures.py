"""What stored runs and baselines know of each format, place by place: what docs/formats.md is made of.

A place is a kind of machine with the model that is told of there: any CPU with the embedded model, one kind of GPU with
Llama-3.1-8B, and with the quality of the embedded model beside it. Where several files measured a case, the latest
measurement counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowbit import baselines, comparison, merge
from lowbit.baselines import Baseline
from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.record import Record
from lowbit.report.rows import HEADLINE, Row, join, workloads_of
from lowbit.runs import Header, Run
from lowbit.workloads import WORKLOADS

CPU = "cpu"
H200 = "nvidia-h200"
NAMES = {CPU: "CPU", H200: "NVIDIA H200"}
"""Places that are always told of, measured or not."""

EMBEDDED, LARGE = "embedded", "llama-3.1-8b"
SINGLE = {workload.id for workload in WORKLOADS if workload.phase == "decode" and workload.batch == 1}


@dataclass(frozen=True)
class Source:
    """One stored run, or a baseline with the medians of ``runs`` of them; skips are among the records."""

    path: Path
    header: Header
    records: Sequence[Record]
    runs: int = 1

    @property
    def place(self) -> str | None:
        """``cpu`` or the slug of a GPU; None where another model than the place's was measured."""
        header = self.header
        if self.on_cpu:
            return CPU if header.model == EMBEDDED else None
        return header.device if self.beside or LARGE in header.model.lower() else None

    @property
    def on_cpu(self) -> bool:
        return self.header.device.startswith("cpu-")

    @property
    def beside(self) -> bool:
        """Of the embedded model on a GPU: its quality alone is told of, what it stores and takes is the 8B's."""
        return self.header.model == EMBEDDED and not self.on_cpu


@dataclass(frozen=True)
class Place:
    """``rows`` are a format's by its id, the fastest decode first; ``records`` all that is known of it; ``beside`` a
    GPU's quality cases of runs of the embedded model."""

    slug: str
    name: str
    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    records: Mapping[str, list[Record]] = field(default_factory=dict)
    beside: Mapping[str, list[Record]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return any(record.outcome == "measured" for found in self.records.values() for record in found)

    def fastest(self, fmt: str) -> Row | None:
        """The mode with the fastest decode at batch 1 and context ~0; None where none was measured."""
        found = self.rows.get(fmt, [])
        return found[0] if found and found[0].decode_tok_s else None

    def decode(self, fmt: str) -> tuple[Row, str] | None:
        """The row that is told of and its workload: decode at batch 1 and context ~0 where that was measured, else at
        the first other context of the table of workloads; the fastest mode. None where no decode at batch 1 was."""
        found = self.rows.get(fmt, [])
        for workload in sorted(workloads_of(found, "decode"), key=lambda name: name != HEADLINE):
            speeds = {place: row.value("decode", workload, "decode_tok_s") for place, row in enumerate(found)}
            timed = {place: speed for place, speed in speeds.items() if speed}
            if workload in SINGLE and timed:
                return found[max(timed, key=timed.__getitem__)], workload
        return None

    def quality(self, fmt: str, family: str) -> float | None:
        """``kld`` or ``ppl`` of the embedded model in this format here."""
        for record in self._all(fmt):
            if record.kind == "quality" and record.outcome == "measured":
                names = [name for name in record.metrics if name.startswith(f"{family}_{EMBEDDED}_")]
                if names:
                    return record.metrics[names[0]]
        return None

    def _all(self, fmt: str) -> list[Record]:
        return [*self.beside.get(fmt, []), *self.records.get(fmt, [])]

    def value(self, fmt: str, name: str) -> float | None:
        """A metric that all of a format's records share, such as ``bits_per_weight``: the first that there is."""
        found = (record.metrics.get(name) for record in self.records.get(fmt, ()))
        return next((value for value in found if value is not None), None)

    def fate(self, fmt: str, kind: str) -> tuple[str, str]:
        """What became of its cases of this kind, of which none was measured, and why: ``skipped`` with a skip's reason,
        else ``failed`` with a failure's first line and its notes; two times "" where nothing is known."""
        found = [record for record in self._all(fmt) if record.kind == kind]
        for record in found:
            if record.unmet is not None:
                return "skipped", record.unmet.reason
        for record in found:
            if lines := (record.error or "").strip().splitlines():
                notes = "; ".join(record.info.get("notes", []))
                return "failed", f"failed: {lines[0]}" + (f" ({notes})" if notes else "")
        return "", ""


def read(paths: Iterable[Path], left_out: Callable[[LowbitError], object] | None = None) -> list[Source]:
    """Every run and baseline of these files and folders.

    Raises LowbitError for a file that is neither, and for one of a folder's that can't be read; with ``left_out`` such
    a one (a run killed as it began) costs itself, and the error is handed there.
    """
    found: list[Source] = []
    for path in paths:
        for file in _files(path):
            try:
                found += _read(file)
            except LowbitError as error:
                if left_out is None or file == path:
                    raise
                left_out(error)
    return found


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise LowbitError(f"{path}: no such kept run, baseline, or folder of some")
    yield from merge.find(path)
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*.json")) if _kind(file) == "baseline")


def _kind(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())["lowbit"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> list[Source]:
    if path.is_file() and _kind(path) == "baseline":
        return [_of_baseline(path, baselines.load(path))]
    return [_of_run(path, run) for run in merge.read(path)]


def _of_run(path: Path, run: Run) -> Source:
    return Source(path, run.header, run.records())


def _of_baseline(path: Path, baseline: Baseline) -> Source:
    header = baseline.header
    records = list(comparison.records_of(baseline).values())
    for record in records:
        record.info = dict(baseline.rows[record.case].info)
    for case, (kind, reason) in baseline.skips.items():
        made = _skipped(case, header)
        made.unmet = Unmet(kind, reason)  # type: ignore[arg-type]  # checked when the run was made
        records.append(made)
    return Source(path, header, records, baseline.runs)


def _skipped(case: str, header: Header) -> Record:
    """The record of a case that a baseline knows by its node id alone; its format is found by ``places``."""
    kind, _, words = case.rpartition("::")[2].partition("[")
    name = words.removesuffix("]")
    of_kind = kind.removeprefix("test_")
    return Record(case, of_kind, name, None, None, header.model, header.load_format, outcome="skipped")  # type: ignore[arg-type]


def places(sources: Sequence[Source], formats: Sequence[str]) -> list[Place]:
    """The CPU and the H200, whether measured or not, and every other GPU that some source measured the 8B or the
    embedded model on."""
    names = NAMES | {s.place: s.header.device_name for s in sources if s.place is not None and s.place not in NAMES}
    return [_place(slug, name, [s for s in sources if s.place == slug], formats) for slug, name in names.items()]


def _place(slug: str, name: str, sources: Sequence[Source], formats: Sequence[str]) -> Place:
    records = _latest([source for source in sources if not source.beside], formats)
    embedded = _latest([source for source in sources if source.beside], formats)
    beside = {fmt: [record for record in found if record.kind == "quality"] for fmt, found in embedded.items()}
    rows: dict[str, list[Row]] = {}
    for row in join(record for each in records.values() for record in each if record.outcome == "measured"):
        rows.setdefault(row.format, []).append(row)
    return Place(slug, name, rows, records, beside)


def _latest(sources: Sequence[Source], formats: Sequence[str]) -> dict[str, list[Record]]:
    """One record of each case, by format."""
    best: dict[str, Record] = {}
    for source in sorted(sources, key=lambda source: source.header.started):
        for record in source.records:
            if record.case not in best or _tells(record) >= _tells(best[record.case]):
                best[record.case] = record
    known = set(formats)
    records: dict[str, list[Record]] = {}
    for record in best.values():
        found = _format(record, known)
        if found is not None:
            records.setdefault(found, []).append(replace(record, format=found))
    return records


def _tells(record: Record) -> int:
    return ("void", "failed", "skipped", "measured").index(record.outcome)


def _format(record: Record, known: set[str]) -> str | None:
    """The id of the record's format: its own, or the longest that a skipped case's name begins with."""
    if record.format in known:
        return record.format
    fitting = [fmt for fmt in known if record.format.startswith(f"{fmt}-")]
    return max(fitting, key=len, default=None)
