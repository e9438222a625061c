"""Lab: one device, one loaded model, at most one format alive at a time; measures one case and returns its Record."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit import backends, calibration, compilers, measure, metrics, models, process_state, quantized, roofline, texts
from lowbit.auto.selection import Chooser
from lowbit.backends import native
from lowbit.card import CardState, disturbed
from lowbit.cases import Case
from lowbit.ceilings import Ceilings, measure_ceilings
from lowbit.device import MIB, Device
from lowbit.errors import LoadError, LowbitError
from lowbit.evaluation import Tasks, harness
from lowbit.formats import Format, Unmet
from lowbit.metrics import Measurement
from lowbit.nvml import Nvml, NvmlUnavailable
from lowbit.profiling import Profiler
from lowbit.quantized import Quantized
from lowbit.quiet import quiet_import
from lowbit.record import Record
from lowbit.scoring import Scorer
from lowbit.spent import Spent, host_peak_mib
from lowbit.timing import Progress, Rounds, Stopwatch, cudagraph_skips, prompt

__all__ = ["Lab", "Progress", "Rounds", "Spent", "host_peak_mib"]


@dataclass
class Lab:
    """Measures cases. ``progress`` is told, in a few words, what is being waited for.

    ``source`` is the text that quality is scored on. With dummy weights, quality is the embedded model's under the
    same format on the same device: the dummy model's own would be a number about noise. ``own_pids`` are processes of
    this run besides this one, its ancestors and its descendants: they never disturb a measurement. ``auto.ask`` is to
    be set where an ``auto`` row may be searched for.
    """

    device: Device
    choice: models.Choice
    source: texts.Source
    progress: Progress = print
    spent: Spent = field(default_factory=Spent)
    own_pids: Callable[[], set[int]] = set
    profiler: Profiler | None = None
    tasks: Tasks | None = None

    def __post_init__(self) -> None:
        self._host: models.HostModel | None = None
        self._embedded: models.HostModel | None = None
        self._current: Quantized | None = None
        self._ceilings: Ceilings | None = None
        self._begun = False
        self.auto = Chooser(self)
        self.nvml: Nvml | None = None
        self.nvml_unavailable = ""
        try:
            self.nvml = Nvml.open(self.device)
        except NvmlUnavailable as error:
            self.nvml_unavailable = str(error)
        if self.device.kind == "cuda":
            torch.cuda.set_device(self.device.torch)  # events, graphs and Triton launches go to the current device
        self.vram = measure.VramMeter(self.device, self.nvml)
        self._scorer = Scorer(self.device, self.source, self.vram, self.progress)
        self._stopwatch = Stopwatch(self.device, self.nvml, self.vram, self.spent, self.progress, self.profiler)

    # -- what is loaded -----------------------------------------------------------------------------------------------

    @property
    def host(self) -> models.HostModel:
        """The master in host memory, read once. Raises LoadError."""
        if self._host is None:
            with self.spent.on("load"):
                try:
                    self._host = models.load(self.choice, progress=self.progress, pin=self.device.kind == "cuda")
                except LowbitError as error:
                    raise LoadError(str(error)) from error
        return self._host

    @property
    def quality_host(self) -> models.HostModel:
        """The model whose quality is scored: the loaded one, or the embedded one beside dummy weights."""
        if self.choice.load_format != "dummy":
            return self.host
        if self._embedded is None:
            with self.spent.on("load"):
                embedded = models.choose("embedded", "auto", self.device, {})
                self._embedded = models.load(embedded, progress=self.progress, pin=False)
        return self._embedded

    @property
    def host_config(self) -> Any:
        return self._host.config if self._host is not None else self.choice.config

    @property
    def ceilings(self) -> Ceilings:
        """The card's measured ceilings, taken once, before any model is on it."""
        if self._ceilings is None:
            self.progress(f"measuring the ceilings of {self.device.name}")
            with self.spent.on("measure"):
                self._free()
                self._ceilings = measure_ceilings(self.device)
        return self._ceilings

    def release(self) -> None:
        """Free the quantized model and every cache on the device: before a confirming process, or after a failure."""
        gc.unfreeze()
        self._free()

    def _free(self) -> None:
        self._current = None
        self.vram.release()

    def close(self) -> None:
        self._scorer.close()
        self._host = self._embedded = None
        self._free()
        gc.unfreeze()
        if self.nvml is not None:
            self.nvml.close()

    def unmet(self, case: Case) -> Unmet | None:
        """Why this case can't run here, or None. Needs no weights, but for an ``auto`` row's search."""
        if (missing := self.auto.unmet(case)) is not None:
            return missing
        case = self.auto.stands_for(case)
        config = self.host_config
        reason = backends.unmet(case.format, self.device, config)
        if reason is None and case.mode is not None:
            reason = compilers.unmet(case.mode, self.device, case.format, case.rows)
        if reason is None and case.mode == "native" and case.workload is not None and case.kind == "decode":
            reason = native.step_unmet(case.format, self.device, config, case.workload.batch)
        if reason is None and case.workload is not None:
            limit = getattr(config, "max_position_embeddings", None)
            if limit is not None and case.workload.context_tokens > limit:
                reason = Unmet(
                    "shape", f"{case.workload.id} needs {case.workload.context_tokens} positions, the model has {limit}"
                )
        if reason is None and (case.kind != "quality" or self.choice.load_format != "dummy"):
            held_mib = 0.0 if self._current is None else self._current.coverage.resident_bytes / MIB
            reason = quantized.too_large(case.format, config, case.workload, self.device, held_mib)
            if reason is not None:  # what a failed test's traceback held is freed by a collection only
                self.vram.release()
                reason = quantized.too_large(case.format, config, case.workload, self.device, held_mib)
        return reason

    def acquire(self, fmt: Format) -> Quantized:
        """The model in this format on the device: the one at hand, or a fresh one from the untouched master."""
        if self._current is not None and self._current.format.id == fmt.id:
            return self._current
        self._current = self.make(self.host, fmt)
        return self._current

    def make(self, host: models.HostModel, fmt: Format) -> Quantized:
        """This model in this format, the one at hand freed before; the Lab does not keep it."""
        self._import_library(fmt)
        return self._make(host, fmt)

    def _import_library(self, fmt: Format) -> None:
        with self.spent.on("imports"):
            for package in backends.get(fmt.backend).PACKAGES:
                if package not in sys.modules:
                    self.progress(f"{fmt.id}: importing {package}")
                quiet_import(package)

    def _make(self, host: models.HostModel, fmt: Format) -> Quantized:
        self._free()
        start_mib = self.vram.process_mib()
        # Collections need not look at the libraries' million objects: 0.3 s each. No model may be alive here: what
        # hangs in a cycle would be frozen with them and never freed.
        gc.freeze()
        self.progress(f"{fmt.id}: quantizing")
        with self.spent.on("quantize") as seconds:
            self.vram.reset_peak()
            windows = fmt.calibration_windows
            tokens = calibration.tokens(host, self.source, windows) if windows else None
            made = quantized.build(host, fmt, self.device, tokens)
        made.quantize_s, made.quantize_peak_mib = seconds(), self.vram.alloc_peak_mib()
        made.start_mib = start_mib
        return made

    # -- one case -----------------------------------------------------------------------------------------------------

    def measure(self, case: Case, nodeid: str, rounds: Rounds) -> Record:
        """Measure one case. A failure inside a library leaves as an exception; the caller records it."""
        started = time.perf_counter()
        self._begin()
        record = case.record(nodeid, self.choice.name, self.choice.load_format)
        self.auto.note(case, record)
        case = self.auto.stands_for(case)
        before = CardState.read(self.nvml, self.own_pids())
        kinds = {"quality": self._measure_quality, "eval": self._measure_evaluation}
        take = kinds.get(case.kind, self._measure_speed)
        measurement = take(case, record, rounds)
        after = CardState.read(self.nvml, self.own_pids())
        disturbance = disturbed(before, after)
        if disturbance is not None:
            record.outcome, record.error = "void", disturbance
        record.metrics = metrics.derive(measurement)
        record.unavailable |= measurement.unavailable
        record.info["card"] = {"before": before.to_dict(), "after": after.to_dict()} if self.nvml else None
        record.info["notes"] = [*record.info.get("notes", ()), *self._notes()]
        record.info["wall_s"] = time.perf_counter() - started
        record.unavailable |= self._missing(case, record)
        return record

    def _begin(self) -> None:
        if self._begun:
            return
        gc.freeze()
        with self.spent.on("warmup"):
            self.vram.warm_up()
        self._begun = True

    def _notes(self) -> list[str]:
        """What did not go as planned with the models and the card, for a record's info."""
        hosts = [host for host in (self._host, self._embedded) if host is not None]
        notes = [note for host in hosts for note in host.notes] + self._scorer.notes
        if self.device.kind == "cuda" and self.nvml is None:
            notes.append(f"no NVML: {self.nvml_unavailable}")
        return notes

    def _missing(self, case: Case, record: Record) -> dict[str, str]:
        """The reason for every metric that this kind of case has elsewhere and this one lacks."""
        if self.device.kind == "cpu":
            absent = {name: "needs an NVIDIA GPU" for name in measure.GPU_METRICS}
        elif self.nvml is None:
            absent = {name: self.nvml_unavailable for name in measure.NVML_METRICS}
        else:
            absent = {}
        return {
            name: reason
            for name, reason in absent.items()
            if case.kind in metrics.METRICS[name].kinds and name not in record.metrics
        }

    def _measure_speed(self, case: Case, record: Record, rounds: Rounds) -> Measurement:
        workload = case.workload
        assert workload is not None
        ceilings = self.ceilings
        made = self.acquire(case.format)
        with self.spent.on("imports"):
            compilers.import_compiler(case.mode or "eager")
        record.dtype = made.dtype
        record.info["coverage"] = made.coverage.to_dict()
        record.info["ceilings"] = ceilings.to_dict()
        config = self.host.config
        m = Measurement(
            kind=case.kind,
            batch=workload.batch,
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            bits_per_weight=made.coverage.bits_per_weight,
            weights_bytes=made.coverage.resident_bytes,
            read_gb_s=ceilings.read_gb_s,
            matmul_tflop_s=ceilings.matmul_tflop_s,
            load_s=self.host.load_s,
            quantize_s=made.quantize_s,
            vram_start_mib=made.start_mib,
            vram_quantize_peak_mib=made.quantize_peak_mib,
        )
        ids = prompt(config.vocab_size, workload.batch, workload.prompt_tokens, self.device)
        self.vram.release()
        self.vram.start_case()
        profiled = self.profiler.recording(case, record) if self.profiler else nullcontext()
        with process_state.preserved_state(), measure.cpu_threads(self.device), profiled:
            take = self._stopwatch.time_decode if case.kind == "decode" else self._stopwatch.time_prefill
            take(case, made, ids, m, rounds)
            m.vram_peak_mib = self.vram.case_peak_mib()
            m.vram_alloc_peak_mib = self.vram.alloc_peak_mib()
            m.graph_breaks, m.recompiles = process_state.counters()
            skips = cudagraph_skips(case, self.device)
            if skips is not None:
                record.info["cudagraph_skips"] = skips
            if skips:
                record.info["notes"] = [
                    *record.info.get("notes", ()),
                    f"{case.name}: Inductor gave up its CUDA graphs, {skips} times",
                ]
        self.vram.release()
        m.vram_end_mib = self.vram.process_mib()
        if case.kind == "decode":
            assert m.kv_bytes_per_token is not None
            context = roofline.mean_context(workload.prompt_tokens, workload.new_tokens)
            m.streamed_bytes_per_step = made.coverage.streamed_bytes + m.kv_bytes_per_token * workload.batch * context
        else:
            m.prefill_flop = roofline.prefill_flop(config, workload.batch, workload.prompt_tokens)
        samples = {name: getattr(m, name) for name in ("decode_s", "prefill_s", "step_s", "yardstick_s")}
        record.samples = {name: values for name, values in samples.items() if values}
        return m

    def _measure_quality(self, case: Case, record: Record, rounds: Rounds) -> Measurement:
        host = self.quality_host
        own = host is self._host
        if not self._scorer.is_ready(host, case.format):
            self._free()
            with self.spent.on("quality"):
                self._scorer.prepare(host, case.format)
        if own:
            made = self.acquire(case.format)
        else:
            made = self.make(host, case.format)
            record.unavailable |= {"ppl": "dummy weights: quality is not applicable"}
        with self.spent.on("quality"):
            return self._scorer.measure(made, host, case, record, rounds, own=own)

    def _measure_evaluation(self, case: Case, record: Record, rounds: Rounds) -> Measurement:
        assert case.task is not None
        assert self.tasks is not None
        made = self.acquire(case.format)
        record.dtype = made.dtype
        record.info["coverage"] = made.coverage.to_dict()
        self.progress(f"{case.name}: evaluating")
        with self.spent.on("quality"):
            batch = 16 if self.device.kind == "cuda" else 1
            outcome = harness.run(made.model, self.host.tokenizer, case.task, self.tasks, batch=batch)
        record.info["eval"] = outcome.info
        return Measurement(
            kind="eval", evaluation=outcome.evaluation, load_s=self.host.load_s, quantize_s=made.quantize_s
        )
