"""BenchSession: the state of one bench run in this process — device, model, baseline, lab, kept run and records."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lowbit import baselines, models, regression, runs, spread, texts
from lowbit.baselines import Baseline
from lowbit.cases import KINDS, Case, enumerate_cases
from lowbit.device import Device, detect, environment
from lowbit.errors import LowbitError
from lowbit.lab import Lab
from lowbit.pytest_plugin import children
from lowbit.pytest_plugin.foreign import ForeignBenchmark
from lowbit.pytest_plugin.keys import CASE
from lowbit.pytest_plugin.options import Settings
from lowbit.record import Record
from lowbit.regression import Verdict

class BenchSession:
    """Everything that bench tests of this process share. Made at configure time; loads no weights until a case needs them."""

    def __init__(self, config: pytest.Config, settings: Settings, progress: Progress) -> None:
        self.config, self.settings, self.progress = config, settings, progress
        self.started = time.perf_counter()
        self.device: Device = detect(settings.device_index)
        self.choice = models.choose(settings.model, settings.load_format, self.device)
        self.source = texts.choose_source(
            self.choice.name, self.choice.load_format, self.choice.config.max_position_embeddings, settings.text
        )
        self.environment = environment(self.device)
        self.records: dict[str, Record] = {}
        self.stats: dict[str, dict[str, Any] | None] = {}
        self.verdicts: dict[str, list[Verdict]] = {}
        self.resumed: dict[str, runs.Entry] = {}
        self.writer: runs.RunWriter | None = None
        self.selected: list[str] = []
        self.poisoned: str | None = None
        self.collected: list[str] = []
        self.accepted: Path | None = None
        self.error: str | None = None
        self.lab = Lab(self.device, self.choice, self.source, progress)
        self.baseline: Baseline | None = self._find_baseline()
        self.spreads = spread.pool_spread(self.baseline.rows.values()) if self.baseline else {}

    # -- baseline -------------------------------------------------------------------------------------------------

    def _find_baseline(self) -> Baseline | None:
        """The baseline to judge by. Raises LowbitError when one is asked for and missing, corrupt or foreign."""
        settings = self.settings
        if settings.child is not None or not (settings.compare or settings.compare_if_baseline):
            return None
        path = self._baseline_path()
        if path is None:
            if settings.compare_if_baseline and not settings.compare:
                return None
            raise LowbitError(
                f"--benchmark-compare: no baseline of {self.choice.name} ({self.choice.load_format}) on {self.device.slug} "
                f"in {settings.baselines_dir / self.device.slug}; make one with: {self.accept_command()}"
            )
        baseline = baselines.load(path)
        baselines.check(baseline, self.device.slug, self.choice.name, self.choice.load_format, self.source.protocol)
        return baseline

    def _baseline_path(self) -> Path | None:
        settings = self.settings
        wanted = settings.compare_to
        if wanted is None:
            return baselines.find(settings.baselines_dir, self.device.slug, self.choice.name, self.choice.load_format)
        if Path(wanted).is_file():
            return Path(wanted)
        folder = settings.baselines_dir / self.device.slug
        matches = sorted(folder.glob(f"{wanted}*.json"))
        if not matches:
            have = ", ".join(path.name for path in sorted(folder.glob("*.json"))) or "none"
            raise LowbitError(f"--benchmark-compare={wanted}: no such file, nor a baseline of that number in {folder} (it has: {have})")
        return matches[-1]

    def accept_command(self, selection: str | None = None) -> str:
        """The command that accepts what this machine measures, for messages."""
        words = ["pytest benches", *self.model_arguments(), "--update-baselines"]
        if selection:
            words.append(f'-k "{selection}"')
        return " ".join(words)

    def model_arguments(self) -> list[str]:
        """The options that choose this run's model, as a user would type them; none where ``auto`` gave it."""
        settings = self.settings
        words = [] if settings.model == "auto" else [f"--model {settings.model}"]
        if settings.load_format != "auto":
            words.append(f"--load-format {settings.load_format}")
        if settings.suite != "quick":
            words.append(f"--suite {settings.suite}")
        return words

    # -- kept runs ------------------------------------------------------------------------------------------------

    def header(self) -> runs.Header:
        option = self.config.option
        given = {"-k": option.keyword, "-m": option.markexpr}
        return runs.Header(
            device=self.device.slug,
            device_name=self.device.name,
            model=self.choice.name,
            load_format=self.choice.load_format,
            protocol=self.source.protocol,
            suite=self.settings.suite,
            environment=self.environment,
            argv=[str(word) for word in self.config.invocation_params.args],
            selection={flag: expression for flag, expression in given.items() if expression},
        )

    def open_run(self, selected: list[str]) -> None:
        """Start keeping this run (never in a child or an xdist worker), or take up the interrupted one on --resume."""
        self.selected = [nodeid for nodeid in selected if "vanished:" not in nodeid]
        if self.settings.child is not None or hasattr(self.config, "workerinput") or not self.selected:
            return
        if self.settings.resume:
            self.writer = runs.resume(self.settings.runs_dir, self.header())
            self.resumed = {case: entry for case, entry in self.writer.entries.items() if entry.record.outcome == "measured"}
        else:
            self.writer = runs.start(self.settings.runs_dir, self.header())

    @property
    def everything_selected(self) -> bool:
        """True when no case of this suite was left out by a path, ``-k``, ``-m`` or ``--lf``."""
        every = sum(len(enumerate_cases(kind, self.settings.suite, self.choice.parameters)) for kind in KINDS)
        return len(self.selected) == every

    def keep(self, record: Record, stats: dict[str, Any] | None) -> None:
        """Put a finished record on disk before the next case starts. ``stats`` as pytest-benchmark's ``as_dict``."""
        self.records[record.case] = record
        self.stats[record.case] = stats
        if self.writer is not None and record.case not in self.resumed:
            self.writer.append(record, stats["stats"] if stats else None)

    def receive(self, record: Record, stats: dict[str, Any] | None) -> None:
        """A worker's result, already judged there: keep it."""
        self.verdicts[record.case] = [Verdict(**verdict) for verdict in record.info.pop("verdicts", [])]
        self.keep(record, stats)

    def close(self, exit_status: int) -> None:
        """Close the kept run and free the device. A child leaves its one record for its parent instead."""
        if self.settings.child is not None:
            children.write_result(self.settings.child, self.records, self.stats)
        elif self.writer is not None:
            ended = exit_status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
            complete = ended and set(self.selected) <= set(self.records)
            self.writer.close(int(exit_status), complete=complete, regressed=self.regressed)
        self.lab.close()

    @property
    def regressed(self) -> bool:
        return any(verdict.fails for verdicts in self.verdicts.values() for verdict in verdicts)

    # -- one case -------------------------------------------------------------------------------------------------

    def obtain(self, item: pytest.Item, benchmark: Any) -> Record:
        """Measure a case here, in a fresh process, or take it from the resumed run. Exceptions leave a failed record."""
        case: Case = item.stash[CASE]
        entry = self.resumed.get(item.nodeid)
        if entry is not None:
            self._present(item, benchmark, entry.record, _nested(entry.stats))
            return entry.record
        unmet = self.lab.unmet(case)
        if unmet is not None:
            record = self._blank(case, item.nodeid)
            record.outcome, record.unmet = "skipped", unmet
            return record
        try:
            if self.poisoned is not None or self.settings.isolate:
                return self._measure_elsewhere(item, benchmark)
            record = self.lab.measure(case, item.nodeid, benchmark.pedantic)
            if record.outcome == "void":
                self.progress(f"{case.name}: disturbed ({record.error}); once more in a fresh process")
                return self._measure_elsewhere(item, benchmark)
        except Exception as error:
            self._note_failure(case, item.nodeid, error)
            raise
        return record

    def _measure_elsewhere(self, item: pytest.Item, benchmark: Any) -> Record:
        record, stats = self.run_child(item.nodeid)
        self._present(item, benchmark, record, stats)
        return record

    def run_child(self, nodeid: str) -> tuple[Record, dict[str, Any] | None]:
        self.lab.release()
        return children.run_case(self.config, nodeid)

    def _present(self, item: pytest.Item, benchmark: Any, record: Record, stats: dict[str, Any] | None) -> None:
        """Show pytest-benchmark a result of another process, in its table and JSON, in this item's place."""
        benchmark._mode = "measured in another process"  # it warns of an unused fixture otherwise
        if stats is not None:
            foreign = ForeignBenchmark.for_item(item, stats, {"lowbit": record.to_dict(samples=False)})
            self.config.pluginmanager.get_plugin("pytest-benchmark").benchmarks.append(foreign)
            benchmark.stats = foreign

    def _blank(self, case: Case, nodeid: str) -> Record:
        return Record(
            case=nodeid,
            kind=case.kind,
            format=case.format.id,
            mode=case.mode,
            workload=case.workload.id if case.workload else None,
            model=self.choice.name,
            load_format=self.choice.load_format,
        )

    def _note_failure(self, case: Case, nodeid: str, error: Exception) -> None:
        record = self._blank(case, nodeid)
        record.outcome, record.error = "failed", f"{type(error).__name__}: {error}"
        self.keep(record, None)
        if is_device_fault(error):
            self.poisoned = record.error
        else:
            self.lab.release()

    # -- judging --------------------------------------------------------------------------------------------------

    def judge(self, case: Case, record: Record) -> list[str]:
        """Compare with the baseline; confirm a suspicion in fresh processes. Returns the messages that fail the test."""
        baseline = self.baseline
        if baseline is None or record.outcome == "void":
            return []
        row = baseline.rows.get(record.case)
        if record.outcome == "skipped":
            return [self._word_new_skip(case, record)] if row is not None else []
        if row is None:
            return [
                f"{case.name} on {self.device.slug}: not in the baseline {baseline.path.name}; accept it with: "
                f"{self.accept_command(case.id)}"
            ]
        verdicts = regression.judge(record, row, self.spreads, self.device.kind)
        if regression.suspicions(verdicts):
            verdicts = self._confirm(case, record, verdicts)
        self.verdicts[record.case] = verdicts
        if hasattr(self.config, "workerinput"):  # travels to the controller with the record
            record.info["verdicts"] = [asdict(verdict) for verdict in verdicts if verdict.status != "ungated"]
        return [regression.message(case.name, self.device.slug, verdict) for verdict in verdicts if verdict.fails]

    def _confirm(self, case: Case, record: Record, verdicts: list[Verdict]) -> list[Verdict]:
        """Measure again in fresh processes, the device freed for them, until one acquits or all have spoken."""
        started = time.perf_counter()
        repeats: list[Record] = []
        for turn in range(regression.REPEATS):
            names = ", ".join(verdict.metric for verdict in regression.suspicions(verdicts))
            self.progress(f"{case.name}: {names} beyond the limit; confirming in fresh process {turn + 1} of {regression.REPEATS}")
            repeats.append(self.run_child(record.case)[0])
            confirmed = regression.confirm(verdicts, repeats)
            if not regression.suspicions(confirmed):
                break
        self.lab.spent.confirm += time.perf_counter() - started
        return confirmed

    def _word_new_skip(self, case: Case, record: Record) -> str:
        return (
            f"{case.name} on {self.device.slug}: measured in the baseline, skipped now ({record.unmet}); "
            f"mend the environment, or accept the skip with: {self.accept_command(case.id)}"
        )


def is_device_fault(error: BaseException) -> bool:
    """True for an error after which nothing works in this process: a CUDA fault, not an out-of-memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    return "CUDA error" in text or "cudaError" in text or "CUDA driver error" in text


def _nested(columns: dict[str, Any] | None) -> dict[str, Any] | None:
    """A kept run's columns in the form of pytest-benchmark's ``as_dict``; the item they are shown for names the rest."""
    if columns is None:
        return None
    blank = dict.fromkeys(("fullname", "name", "group", "param", "params"))
    return {**blank, "extra_info": {}, "options": {}, "stats": columns}
