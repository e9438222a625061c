"""BenchSession: the state of one bench run in this process — device, model, baseline, lab, kept run and records."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lowbit import models, runs, texts
from lowbit.baselines import Baseline
from lowbit.cases import KINDS, enumerate_cases
from lowbit.device import Device, detect, environment, launch_blocking, source_commit
from lowbit.errors import LoadError, LowbitError
from lowbit.faults import is_device_fault
from lowbit.lab import Lab
from lowbit.profiling import Profiler
from lowbit.pytest_plugin import children, evaluation, gate
from lowbit.pytest_plugin.collection import VANISHED
from lowbit.pytest_plugin.keys import UNLOADABLE
from lowbit.pytest_plugin.options import DEFAULT_BASELINE_RUNS, Settings
from lowbit.record import Record
from lowbit.regression import Blunt, Verdict
from lowbit.report.progress import Progress
from lowbit.spent import Spent
from lowbit.spread import Spreads, pool_spread


class BenchSession:
    """All that the bench tests of this process share. Made at configure time; no weights until a case needs them."""

    def __init__(self, config: pytest.Config, settings: Settings, progress: Progress) -> None:
        self.config, self.settings, self.progress = config, settings, progress
        self.started = time.perf_counter()
        self.device: Device = detect(settings.device_index)
        spent = Spent()
        with spent.on("imports"):  # of transformers, whose configurations describe every model
            self.choice = models.choose(settings.model, settings.load_format, self.device)
        self.source = texts.choose_source(
            self.choice.name, self.choice.load_format, self.choice.config.max_position_embeddings, settings.text
        )
        if settings.tasks is not None and self.choice.load_format == "dummy":
            raise LowbitError("--eval needs real weights: with --load-format dummy quality is not applicable")
        self.environment, self.commit = environment(self.device), source_commit()
        self.records: dict[str, Record] = {}
        self.stats: dict[str, dict[str, Any] | None] = {}
        self.verdicts: dict[str, list[Verdict]] = {}
        self.repeats: dict[str, list[dict[str, float]]] = {}
        self.vanished: list[str] = []
        self.patched: str | None = None
        self.resumed: dict[str, runs.Entry] = {}
        self.writer: runs.RunWriter | None = None
        self.selected: list[str] = []
        self.poisoned: str | None = None
        self.accepted: Path | None = None
        self.warnings: list[Blunt] = []
        self.told: list[str] = []
        self.error: str | None = None
        self.refused = False
        self.blocking = launch_blocking()
        gate.refuse_blocking(self)
        gate.check_accepted(self)
        self.baseline: Baseline | None = gate.find_baseline(self)
        self.spreads = pool_spread(self.baseline.rows.values()) if self.baseline else Spreads()
        profiler = Profiler(self.device, settings.profile) if settings.profile else None
        self.lab = Lab(
            self.device,
            self.choice,
            self.source,
            progress,
            spent,
            own_pids=children.own_pids,
            profiler=profiler,
            tasks=settings.tasks,
        )
        self.lab.auto.ask = settings.auto

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those of lm-evaluation-harness that --eval asks for."""
        return self.settings.tasks.names if self.settings.tasks else ()

    @property
    def in_worker(self) -> bool:
        """True in an xdist worker: its controller keeps the run."""
        return hasattr(self.config, "workerinput")

    # -- commands for messages ------------------------------------------------------------------------------------

    def accept_command(self, selection: str | None = None) -> str:
        """The command that accepts what this machine measures, for messages."""
        words = ["pytest benches", *self.model_arguments(), "--update-baselines"]
        given: Path | None = self.config.option.baselines_dir
        if given is not None:
            words.append(f"--baselines-dir {shlex.quote(str(given))}")
        if self.settings.baseline_runs != DEFAULT_BASELINE_RUNS:
            words.append(f"--baseline-runs {self.settings.baseline_runs}")
        if selection:
            words.append(f'-k "{selection}"')
        return " ".join(words)

    def model_arguments(self) -> list[str]:
        """The options that choose this run's model, as a user would type them; none where ``auto`` gave it."""
        settings = self.settings
        words = [] if settings.model == "auto" else [f"--model {shlex.quote(settings.model)}"]
        if settings.load_format != "auto":
            words.append(f"--load-format {settings.load_format}")
        if settings.suite != "quick":
            words.append(f"--suite {settings.suite}")
        if settings.text is not None:
            words.append(f"--text {shlex.quote(str(settings.text))}")
        if self.config.option.recipe is not None:
            words.append(f"--recipe {shlex.quote(str(self.config.option.recipe))}")
        words += evaluation.arguments(settings.tasks)
        for name in ("max_kld", "auto_seconds"):  # what auto finds depends on them
            if (given := getattr(self.config.option, name)) is not None:
                words.append(f"--{name.replace('_', '-')} {given:g}")
        if settings.device_index:
            words.append(f"--lowbit-device {settings.device_index}")
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
            commit=self.commit,
        )

    def select(self, nodeids: list[str]) -> None:
        """What this run is about: the collected node ids, vanished cases among them."""
        self.vanished = [nodeid.replace(VANISHED, "") for nodeid in nodeids if VANISHED in nodeid]
        self.selected = [nodeid for nodeid in nodeids if VANISHED not in nodeid]

    def open_run(self) -> None:
        """Start keeping this run, or take up the interrupted one on --resume. Raises LowbitError when that can't be.

        A child keeps nothing; a worker learns what --resume has, its controller keeps.
        """
        if self.settings.child is not None or self.settings.profile or not self.selected:
            return
        folder, header = self.settings.runs_dir, self.header()
        entries: Mapping[str, runs.Entry] = {}
        if self.in_worker:
            interrupted = runs.latest_incomplete(folder, header) if self.settings.resume else None
            entries = interrupted.entries if interrupted else {}
        else:
            self.writer = runs.resume(folder, header) if self.settings.resume else runs.start(folder, header)
            entries = self.writer.entries
        self.resumed = {case: entry for case, entry in entries.items() if entry.record.outcome == "measured"}

    @property
    def everything_selected(self) -> bool:
        """True when no case of this suite was left out by a path, ``-k``, ``-m`` or ``--lf``."""
        every = sum(len(enumerate_cases(kind, self.settings.suite, self.choice.parameters)) for kind in KINDS)
        return len(self.selected) == every

    def keep(self, record: Record, stats: dict[str, Any] | None) -> None:
        """Put a finished record on disk before the next case starts. ``stats`` as pytest-benchmark's ``as_dict``.

        Raises LowbitError when the disk refuses: what is measured after that could not be kept.
        """
        self.records[record.case], self.stats[record.case] = record, stats
        if self.writer is not None and record.case not in self.resumed:
            try:
                self.writer.append(record, stats["stats"] if stats else None)
            except LowbitError:
                self.refused = True
                raise

    def receive(self, record: Record, stats: dict[str, Any] | None) -> None:
        """A worker's result, already judged there: keep it. A model that can't be loaded ends the run, told once and
        not by every worker in every case."""
        self.repeats[record.case] = record.info.pop("repeats", [])
        verdicts = record.info.pop("verdicts", None)
        self.keep(record, stats)
        if verdicts is not None:
            self.note_verdicts(record, [Verdict(**verdict) for verdict in verdicts])
        if UNLOADABLE in record.info:
            pytest.exit(str(record.error), returncode=pytest.ExitCode.USAGE_ERROR)

    def note_verdicts(self, record: Record, verdicts: list[Verdict]) -> None:
        """The gate's word on a kept record, on disk with it: a later report tells how often it was confirmed."""
        self.verdicts[record.case] = verdicts
        if self.writer is not None and self.baseline is not None:
            told = [verdict.to_dict() for verdict in verdicts if verdict.status != "ungated"]
            try:
                self.writer.judged(record.case, told, self.baseline.identity)
            except LowbitError:
                self.refused = True
                raise

    def withdraw_verdicts(self, record: Record) -> None:
        """Keep a record anew that became void after it was judged: its figures are no evidence."""
        del self.verdicts[record.case]
        self.repeats.pop(record.case, None)
        for name in (runs.JUDGED, "verdicts", "repeats"):
            record.info.pop(name, None)
        self.resumed.pop(record.case, None)
        self.keep(record, self.stats[record.case])

    def close(self, exit_status: int) -> None:
        """Close the kept run and free the device. A child leaves its one record for its parent instead."""
        try:
            if self.settings.child is not None:
                children.write_result(self.settings.child, self.records, self.stats)
            elif self.writer is not None and self.refused:
                self.writer.__exit__()  # an end line would be glued to the half-written one
            elif self.writer is not None and exit_status == pytest.ExitCode.USAGE_ERROR and not self.writer.entries:
                self.writer.discard()  # a broken -k: nothing to continue, and no "newest run" for `compare` or `report`
                self.writer = None
            elif self.writer is not None:
                ended = exit_status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
                complete = ended and set(self.selected) <= set(self.records)
                self.writer.close(int(exit_status), complete=complete, regressed=self.regressed)
        finally:
            self._close_lab()

    def _close_lab(self) -> None:
        try:
            self.lab.close()
        except RuntimeError as error:
            if self.poisoned is None or not is_device_fault(error):
                raise
            # Nothing can be freed after a CUDA fault; the device takes it all back when this process ends.

    @property
    def unreached(self) -> int:
        """How many selected cases have no result: left by Ctrl-C, ``-x`` or an error that ended the run."""
        return len(set(self.selected) - set(self.records))

    @property
    def regressed(self) -> bool:
        return any(verdict.fails for verdicts in self.verdicts.values() for verdict in verdicts)

    def run_child(self, nodeid: str) -> tuple[Record, dict[str, Any] | None]:
        """Measure a case in a fresh process, this one's device memory freed for it. Raises LowbitError if it failed,
        LoadError if it can't load the model."""
        if self.poisoned is None:  # after a CUDA fault nothing can be freed any more
            self.lab.release()
        record, stats = children.run_case(self.config, nodeid)
        if UNLOADABLE in record.info:
            raise LoadError(record.error)
        return record, stats
