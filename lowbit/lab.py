"""Lab: one device, one loaded model, at most one format alive at a time; measures one case and returns its Record."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lowbit import backends, compilers, generate, measure, metrics, models, quality, roofline, texts
from lowbit.backends import coverage
from lowbit.card import CardState, disturbed
from lowbit.cases import Case
from lowbit.ceilings import Ceilings, measure_ceilings
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, Unmet
from lowbit.metrics import Measurement
from lowbit.nvml import Nvml, NvmlUnavailable
from lowbit.record import Record

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Rounds = Callable[..., Any]
"""``pytest_benchmark``'s ``benchmark.pedantic``: called with target, setup, rounds, warmup_rounds."""
Progress = Callable[[str], None]

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Quantized:
    """One format made from the master: the model on the device and what making it took."""

    format: Format
    dtype: str
    model: LlamaForCausalLM
    coverage: coverage.Coverage
    quantize_s: float
    quantize_peak_mib: float | None
    start_mib: float | None


@dataclass
class Spent:
    """Where the wall time went, in seconds: the footer's figures."""

    load: float = 0.0
    quantize: float = 0.0
    compile: float = 0.0
    measure: float = 0.0
    quality: float = 0.0
    confirm: float = 0.0

    def total(self) -> float:
        return sum(vars(self).values())


@dataclass
class Lab:
    """Measures cases. ``progress`` is told, in a few words, what is being waited for.

    ``source`` is the text that quality is scored on. With dummy weights, quality is
    the embedded model's under the same format on the same device: the dummy model's own would be a number about noise.
    """

    device: Device
    choice: models.Choice
    source: texts.Source
    progress: Progress = print
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._host: models.HostModel | None = None
        self._embedded: models.HostModel | None = None
        self._current: Quantized | None = None
        self._references: dict[str, quality.Reference] = {}
        self._text: quality.Text | None = None
        self._ceilings: Ceilings | None = None
        self._context_mib: float | None = None
        self.nvml: Nvml | None = None
        self.nvml_unavailable = ""
        try:
            self.nvml = Nvml.open(self.device)
        except NvmlUnavailable as error:
            self.nvml_unavailable = str(error)
        self.vram = measure.VramMeter(self.device, self.nvml)

    # -- what is loaded -------------------------------------------------------------------------------------------

    @property
    def host(self) -> models.HostModel:
        """The master in host memory, read once."""
        if self._host is None:
            with self._spend("load"):
                self._host = models.load(self.choice, progress=self.progress, pin=self.device.kind == "cuda")
        return self._host

    @property
    def ceilings(self) -> Ceilings:
        """The card's measured ceilings, taken once, before any model is on it."""
        if self._ceilings is None:
            self.progress(f"measuring the ceilings of {self.device.name}")
            with self._spend("measure"):
                self.release()
                self._ceilings = measure_ceilings(self.device)
        return self._ceilings

    def release(self) -> None:
        """Free the quantized model and every cache on the device: before another format, or a confirming process."""
        self._current = None
        self.vram.release()

    def close(self) -> None:
        for reference in self._references.values():
            reference.close()
        self._references.clear()
        self.release()
        if self.nvml is not None:
            self.nvml.close()

    def unmet(self, case: Case) -> Unmet | None:
        """Why this case can't run here, or None. Needs no weights."""
        config = self.host_config
        reason = backends.unmet(case.format, self.device, config)
        if reason is None and case.mode is not None:
            reason = compilers.unmet(case.mode, self.device, case.format)
        if reason is None and case.workload is not None:
            limit = getattr(config, "max_position_embeddings", None)
            if limit is not None and case.workload.context_tokens > limit:
                reason = Unmet(
                    "shape", f"{case.workload.id} needs {case.workload.context_tokens} positions, the model has {limit}"
                )
        return reason

    @property
    def host_config(self) -> Any:
        return self._host.config if self._host is not None else self.choice.config

    def acquire(self, fmt: Format) -> Quantized:
        """The model in this format on the device: the one at hand, or a fresh one from the untouched master."""
        if self._current is not None and self._current.format.id == fmt.id:
            return self._current
        host = self.host
        self.release()
        if self._context_mib is None:
            self._context_mib = self.vram.warm_up()
        start_mib = self.vram.process_mib()
        self.progress(f"{fmt.id}: quantizing")
        with self._spend("quantize") as clock:
            self.vram.reset_peak()
            model, dtype = self._build(host, fmt)
            peak = self.vram.alloc_peak_mib()
        self._current = Quantized(fmt, dtype, model, coverage.inspect(model, fmt), clock(), peak, start_mib)
        return self._current

    def _build(self, host: models.HostModel, fmt: Format) -> tuple[LlamaForCausalLM, str]:
        dtype = self.device.dtype_for(fmt)
        if dtype is None:
            raise LowbitError(f"{fmt.id} needs one of {', '.join(fmt.dtypes)}; {self.device.name} has none of them")
        backend = backends.get(fmt.backend)
        torch_dtype = TORCH_DTYPES[dtype]

        def transform(module: torch.nn.Module) -> None:
            backend.quantize(module, fmt, torch_dtype)

        model = host.build(self.device.torch, torch_dtype, transform if fmt.quantized else None)
        measure.synchronize(self.device)
        return model, dtype

    # -- one case -------------------------------------------------------------------------------------------------

    def measure(self, case: Case, nodeid: str, rounds: Rounds) -> Record:
        """Measure one case. A failure inside a library leaves as an exception; the caller records it."""
        started = time.perf_counter()
        record = Record(
            case=nodeid,
            kind=case.kind,
            format=case.format.id,
            mode=case.mode,
            workload=case.workload.id if case.workload else None,
            model=self.choice.name,
            load_format=self.choice.load_format,
        )
        before = CardState.read(self.nvml)
        measurement = self._measure_quality(case, record, rounds) if case.kind == "quality" else self._measure_speed(case, record, rounds)
        after = CardState.read(self.nvml)
        disturbance = disturbed(before, after)
        if disturbance is not None:
            record.outcome, record.error = "void", disturbance
        record.metrics = metrics.derive(measurement)
        record.info["card"] = {"before": before.to_dict(), "after": after.to_dict()} if self.nvml else None
        record.info["wall_s"] = time.perf_counter() - started
        record.unavailable |= self._missing(case, record)
        return record

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
        quantized = self.acquire(case.format)
        record.dtype = quantized.dtype
        record.info["coverage"] = quantized.coverage.to_dict()
        config = self.host.config
        measurement = Measurement(
            kind=case.kind,
            batch=workload.batch,
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            weights_bytes=quantized.coverage.resident_bytes,
            read_gb_s=ceilings.read_gb_s,
            matmul_tflop_s=ceilings.matmul_tflop_s,
            load_s=self.host.load_s,
            quantize_s=quantized.quantize_s,
            vram_start_mib=quantized.start_mib,
            vram_quantize_peak_mib=quantized.quantize_peak_mib,
        )
        record.info["ceilings"] = ceilings.to_dict()
        ids = prompt(config.vocab_size, workload.batch, workload.prompt_tokens, self.device)
        self.vram.release()
        with compilers.preserved_state(), measure.cpu_threads(self.device):
            if case.kind == "decode":
                self._time_decode(case, quantized, ids, measurement, record, rounds)
            else:
                self._time_prefill(case, quantized, ids, measurement, record, rounds)
            if self._context_mib is not None:
                measurement.vram_peak_mib = self.vram.case_peak_mib(quantized.start_mib, self._context_mib)
            measurement.vram_alloc_peak_mib = self.vram.alloc_peak_mib()
            measurement.graph_breaks, measurement.recompiles = compilers.counters()
        gc.collect()
        self.vram.release()
        measurement.vram_end_mib = self.vram.process_mib()
        if case.kind == "decode":
            measurement.streamed_bytes_per_step = quantized.coverage.streamed_bytes + roofline.kv_bytes_per_step(
                config, workload.batch, workload.prompt_tokens, workload.new_tokens
            )
        else:
            measurement.prefill_flop = roofline.prefill_flop(config, workload.batch, workload.prompt_tokens)
        return measurement

    def _time_decode(
        self, case: Case, quantized: Quantized, ids: torch.Tensor, m: Measurement, record: Record, rounds: Rounds
    ) -> None:
        new_tokens = m.new_tokens
        decoder = self._make_decoder(case, quantized, ids)
        with self._spend("compile"):
            decoder.compile(self._compiler(case, quantized))
            m.compile_s = self._warm_up(lambda: decoder.generate(ids, WARM_STEPS), case)
            decoder.prefill(ids)
            probed = min(new_tokens, PROBE_STEPS)
            step_s = self._time_once(lambda: decoder.decode(probed)) / probed
        clock = measure.StepClock(self.device)

        def setup() -> None:
            m.prefill_s.append(self._time_once(lambda: decoder.prefill(ids)))
            m.yardstick_s.extend(measure.yardsticks(self.device))

        def target() -> None:
            clock.start()
            decoder.decode(new_tokens, clock.mark)

        self._say(case, "measuring")
        with self._spend("measure"):
            self.vram.reset_peak()
            timer = RoundTimer(self.device, target, lambda: m.step_s.extend(clock.seconds()))
            rounds(timer, setup=setup, rounds=round_count(step_s * new_tokens))
            m.decode_s = timer.seconds
            if self.nvml is not None:
                steps = max(1, min(new_tokens, int(1 / step_s)))  # a slow format's whole round would take half a minute
                reading = measure.energy(self.nvml, self.device, lambda: decoder.again(steps))
                m.energy_j, m.energy_tokens = reading.joules, reading.repetitions * steps * ids.shape[0]
        record.samples = {"decode_s": m.decode_s, "prefill_s": m.prefill_s, "step_s": m.step_s, "yardstick_s": m.yardstick_s}

    def _time_prefill(
        self, case: Case, quantized: Quantized, ids: torch.Tensor, m: Measurement, record: Record, rounds: Rounds
    ) -> None:
        decoder = self._make_decoder(case, quantized, ids)
        with self._spend("compile"):
            decoder.compile_prefill(self._compiler(case, quantized))
            m.compile_s = self._warm_up(lambda: decoder.prefill(ids), case)
            estimate = self._time_once(lambda: decoder.prefill(ids))
        self._say(case, "measuring")
        with self._spend("measure"):
            self.vram.reset_peak()
            timer = RoundTimer(self.device, lambda: decoder.prefill(ids))
            rounds(timer, setup=lambda: m.yardstick_s.extend(measure.yardsticks(self.device)), rounds=round_count(estimate))
            m.prefill_s = timer.seconds
        record.samples = {"prefill_s": m.prefill_s, "yardstick_s": m.yardstick_s}

    def _make_decoder(self, case: Case, quantized: Quantized, ids: torch.Tensor) -> generate.Decoder:
        """A decoder of this case's shape whose logits have been seen to be finite."""
        assert case.workload is not None
        self._say(case, "warming up" if case.mode == "eager" else "compiling")
        # one place more than is timed, for the step whose logits are looked at
        length = case.workload.context_tokens + 1
        decoder = generate.Decoder(quantized.model, ids.shape[0], length, TORCH_DTYPES[quantized.dtype])
        decoder.check_finite(ids, case.name)
        return decoder

    def _compiler(self, case: Case, quantized: Quantized) -> Callable[[Any], Any]:
        mode, layers = case.mode or "eager", quantized.model.model.layers
        return lambda call: compilers.compile_call(call, mode, self.device, case.format.inductor, list(layers))

    def _say(self, case: Case, step: str) -> None:
        self.progress(f"{case.name}: {step}")

    def _time_once(self, call: Callable[[], object]) -> float:
        measure.synchronize(self.device)
        started = time.perf_counter()
        call()
        measure.synchronize(self.device)
        return time.perf_counter() - started

    def _warm_up(self, call: Callable[[], object], case: Case) -> float:
        """Three calls: compile, record the CUDA graph, replay. Compile seconds = the first two less twice the third."""
        first, second, third = (self._time_once(call) for _ in range(3))
        return 0.0 if case.mode == "eager" else max(0.0, first + second - 2 * third)

    # -- quality --------------------------------------------------------------------------------------------------

    @property
    def quality_host(self) -> models.HostModel:
        """The model whose quality is scored: the loaded one, or the embedded one beside dummy weights."""
        if self.choice.load_format != "dummy":
            return self.host
        if self._embedded is None:
            with self._spend("load"):
                embedded = models.choose("embedded", "auto", self.device, {})
                self._embedded = models.load(embedded, progress=self.progress, pin=False)
        return self._embedded

    @property
    def quality_text(self) -> quality.Text:
        if self._text is None:
            self._text = self.source.load(self.quality_host.tokenizer)
        return self._text

    def _reference(self) -> quality.Reference:
        """Logits of this run's own bf16 (fp16 where the card has no bf16), made once a session."""
        base = FORMATS["bf16-torch"] if self.device.dtype_for(FORMATS["bf16-torch"]) else FORMATS["fp16-torch"]
        if base.id not in self._references:
            self.progress(f"{base.id}: reference logits")
            model, _ = self._build(self.quality_host, base)
            with torch.no_grad():
                self._references[base.id] = quality.Reference.build(model, self.quality_text, source=base.id)
            del model
            self.vram.release()
        return self._references[base.id]

    def _measure_quality(self, case: Case, record: Record, rounds: Rounds) -> Measurement:
        with self._spend("quality"):
            text = self.quality_text
            if self._references:
                reference = self._reference()
            else:
                self.release()
                reference = self._reference()
            if self.quality_host is self.host:
                quantized = self.acquire(case.format)
                model, dtype, cover, quantize_s = quantized.model, quantized.dtype, quantized.coverage, quantized.quantize_s
            else:
                started = time.perf_counter()
                model, dtype = self._build(self.quality_host, case.format)
                quantize_s = time.perf_counter() - started
                cover = coverage.inspect(model, case.format)
                record.unavailable |= {"ppl": "dummy weights: quality is not applicable"}
            record.dtype = dtype
            record.info["coverage"] = cover.to_dict()
            record.info["quality_model"] = self.quality_host.name
            self.progress(f"{case.format.id}: perplexity and KL on {text.protocol}")
            scored: list[metrics.Quality] = []

            def target() -> None:
                with torch.no_grad(), compilers.preserved_state(), measure.cpu_threads(self.device):
                    scored.append(quality.score(model, text, reference, source=case.name))

            rounds(target, rounds=1)
            own = self.quality_host is self.host
            return Measurement(
                kind="quality",
                quality=scored[-1],
                weights_bytes=cover.resident_bytes if own else None,
                checkpoint_bytes=cover.resident_bytes - _unsaved_bytes(model) if own else None,
                load_s=self.quality_host.load_s,
                quantize_s=quantize_s,
            )

    @contextmanager
    def _spend(self, purpose: str) -> Iterator[Callable[[], float]]:
        started = time.perf_counter()
        nested = self.spent.total()
        elapsed = 0.0

        def seconds() -> float:
            return elapsed

        try:
            yield seconds
        finally:
            elapsed = time.perf_counter() - started
            inner = self.spent.total() - nested
            setattr(self.spent, purpose, getattr(self.spent, purpose) + elapsed - inner)


WARM_STEPS = 4
"""Decoded steps of a warm-up call: CUDA graph trees compile in the first and record in the second."""


PROBE_STEPS = 16
"""Decoded steps from which a round's length is foreseen."""


class RoundTimer:
    """A target that keeps its own device-synchronised seconds of each round beside pytest-benchmark's."""

    def __init__(self, device: Device, target: Callable[[], object], after: Callable[[], None] | None = None) -> None:
        self.device, self.target, self.after = device, target, after
        self.seconds: list[float] = []

    def __call__(self) -> None:
        measure.synchronize(self.device)
        started = time.perf_counter()
        self.target()
        measure.synchronize(self.device)
        self.seconds.append(time.perf_counter() - started)
        if self.after is not None:
            self.after()


def _unsaved_bytes(model: LlamaForCausalLM) -> int:
    """Buffers that no checkpoint holds: RoPE's inverse frequencies follow from the config."""
    return sum(buffer.numel() * buffer.element_size() for buffer in model.model.rotary_emb.buffers())


def round_count(seconds: float, budget_s: float = 3.0) -> int:
    """How many rounds to time: about three seconds' worth, at least 3 and at most 15; 1 where a round takes 5 s."""
    return 1 if seconds > 5 else max(3, min(15, round(budget_s / max(seconds, 1e-6))))


def prompt(vocab_size: int, batch: int, tokens: int, device: Device) -> torch.Tensor:
    """The same token ids in every run: [batch, tokens] int64, a fixed stride through the vocabulary."""
    ids = (torch.arange(batch * tokens, dtype=torch.int64) * 7919 + 1013) % vocab_size
    return ids.view(batch, tokens).to(device.torch)


def host_peak_mib() -> float:
    """Peak resident host memory of this process in MiB (Linux: ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
