"""Lab: measures one case with what is loaded, and returns its Record."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from lowbit import compilers, measure, metrics, process_state, roofline
from lowbit.auto.selection import Chooser
from lowbit.card import CardState, disturbed
from lowbit.cases import Case
from lowbit.evaluation import Tasks, harness
from lowbit.formats import Unmet
from lowbit.loaded import Loaded
from lowbit.metrics import Measurement
from lowbit.profiling import Profiler
from lowbit.record import Record
from lowbit.scoring import Scorer
from lowbit.timing import Rounds, Stopwatch, cudagraph_skips, prompt


@dataclass
class Lab(Loaded):
    """Measures cases.

    ``own_pids`` are processes of this run besides this one, its ancestors and its descendants: they never disturb a
    measurement. ``auto.ask`` is to be set where an ``auto`` row may be searched for.
    """

    own_pids: Callable[[], set[int]] = set
    profiler: Profiler | None = None
    tasks: Tasks | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._begun = False
        self.auto = Chooser(self)
        self._scorer = Scorer(self.device, self.source, self.vram, self.progress)
        self._stopwatch = Stopwatch(self.device, self.nvml, self.vram, self.spent, self.progress, self.profiler)

    def close(self) -> None:
        self._scorer.close()
        super().close()

    def unmet(self, case: Case) -> Unmet | None:
        """Why this case can't run here, or None. Needs no weights, but for an ``auto`` row's search."""
        if (missing := self.auto.unmet(case)) is not None:
            return missing
        return super().unmet(self.auto.stands_for(case))

    def measure(self, case: Case, nodeid: str, rounds: Rounds) -> Record:
        """Measure one case. A failure inside a library leaves as an exception; the caller records it."""
        started = time.perf_counter()
        self.begin()
        record = case.record(nodeid, self.choice.name, self.choice.load_format)
        self.auto.note(case, record)
        case = self.auto.stands_for(case)
        began_us = time.time_ns() // 1000
        before = CardState.read(self.nvml, self.own_pids())
        kinds = {"quality": self._measure_quality, "eval": self._measure_evaluation}
        take = kinds.get(case.kind, self._measure_speed)
        measurement = take(case, record, rounds)
        after = CardState.read(self.nvml, self.own_pids(), began_us)
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

    def begin(self) -> None:
        """Settle the process, once, while no model is in it: what a search leaves behind in cycles would be frozen, and
        its kernels would count as the first case's memory."""
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
            m.compiled_anew = process_state.compiled_anew()
            if m.attention:
                record.info["attention"] = m.attention
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
