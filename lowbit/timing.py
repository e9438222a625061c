"""The timed part of a speed case: warm-up, compile, and the rounds of a decode or a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowbit import compilers, energy, generate, kvcache, measure, process_state
from lowbit.cases import Case
from lowbit.device import Device
from lowbit.generate import native
from lowbit.metrics import Measurement
from lowbit.nvml import Nvml, NvmlUnavailable
from lowbit.profiling import STEPS, Profiler
from lowbit.quantized import TORCH_DTYPES, Quantized
from lowbit.spent import Spent

Rounds = Callable[..., Any]
"""``pytest_benchmark``'s ``benchmark.pedantic``: called with target, setup, rounds."""
Progress = Callable[[str], None]

WARM_STEPS = 4
"""Decoded steps of a warm-up call: CUDA graph trees compile in the first and record in the second."""

PROBE_STEPS = 16
"""Decoded steps from which a round's length is foreseen."""


ENERGY_STRETCH_S = 0.03
"""Seconds that one step of the energy window takes."""


@dataclass
class Stopwatch:
    """Times one case of one quantized model; what it finds goes into a Measurement."""

    device: Device
    nvml: Nvml | None
    vram: measure.VramMeter
    spent: Spent
    progress: Progress
    profiler: Profiler | None = None

    def time_decode(self, case: Case, quantized: Quantized, ids: torch.Tensor, m: Measurement, rounds: Rounds) -> None:
        """Rounds of ``m.new_tokens`` dependent steps after an own prefill of ids [B, S]; then the energy of a step."""
        decoder = self._decoder(case, quantized, ids)
        m.kv_bytes_per_token = kvcache.bytes_per_token(decoder.cache)
        with self.spent.on(_warming(case)):
            native_s = 0.0
            if case.mode == "native":
                native_s = self._time_once(lambda: decoder.run_natively(ids, case.name, self.progress))
                m.attention = decoder.native.attention if decoder.native is not None else ""
            else:
                decoder.compile(self._compiler(case, quantized))
            m.compile_s = native_s + self._warm_up(lambda: decoder.generate(ids, WARM_STEPS), case)
            decoder.prefill(ids)
            probed = min(m.new_tokens, PROBE_STEPS)
            step_s = self._time_once(lambda: decoder.decode(probed)) / probed
            decoder.check_length(case.name)
        clock = measure.StepClock(self.device)

        def setup() -> None:
            measure.use_second_stream(self.device)
            m.prefill_s.append(self._time_once(lambda: decoder.prefill(ids)))
            m.yardstick_s.extend(measure.yardsticks(self.device))

        def target() -> None:
            clock.start()
            decoder.decode(m.new_tokens, clock.mark)

        self.progress(f"{case.name}: measuring")
        with self.spent.on("measure"):
            measure.settle(self.device)
            self.vram.trim()
            decoder.generate(ids, WARM_STEPS)  # untimed: takes the blocks that the rounds need
            self.vram.reset_peak()
            timer = RoundTimer(self.device, target, lambda: m.step_s.extend(clock.seconds()))
            rounds(timer, setup=setup, rounds=round_count(step_s * m.new_tokens))
            m.decode_s = timer.seconds
            if self.device.kind == "cuda":
                m.issue_s = timer.issued
            if self.profiler is not None:
                self.profiler.take(case, quantized.model, decoder.again, m.batch, min(m.new_tokens, STEPS))
            if self.nvml is not None:
                self._weigh(self.nvml, decoder, step_s, m)

    def _weigh(self, nvml: Nvml, decoder: generate.Decoder, step_s: float, m: Measurement) -> None:
        """Joules of decoding on from the prompt's end, in stretches short beside the counter's 100 ms."""
        steps = max(1, min(m.new_tokens, int(ENERGY_STRETCH_S / step_s)))
        try:
            reading = energy.measure(nvml, self.device, lambda: decoder.again(steps))
        except NvmlUnavailable as error:  # a MIG slice has no counter of its own
            m.unavailable["energy_j_per_tok"] = str(error)
        else:
            m.energy_j, m.energy_tokens = reading.joules, reading.repetitions * steps * m.batch

    def time_prefill(self, case: Case, quantized: Quantized, ids: torch.Tensor, m: Measurement, rounds: Rounds) -> None:
        """Rounds of one forward pass over ids [B, S] up to the first token."""
        decoder = self._decoder(case, quantized, ids)
        with self.spent.on(_warming(case)):
            native_s = 0.0
            own = case.mode == "native" and not case.format.kv  # a quantized cache is filled by the model's modules
            if own and native.takes(quantized.model, ids.shape[0]):
                native_s = self._time_once(lambda: decoder.run_natively(ids, case.name, self.progress))
            else:
                decoder.compile_prefill(self._compiler(case, quantized))
            m.compile_s = native_s + self._warm_up(lambda: decoder.prefill(ids), case)
            estimate = self._time_once(lambda: decoder.prefill(ids))

        def setup() -> None:
            measure.use_second_stream(self.device)
            m.yardstick_s.extend(measure.yardsticks(self.device))

        self.progress(f"{case.name}: measuring")
        with self.spent.on("measure"):
            measure.settle(self.device)
            self.vram.trim()
            decoder.prefill(ids)
            self.vram.reset_peak()
            timer = RoundTimer(self.device, lambda: decoder.prefill(ids))
            rounds(timer, setup=setup, rounds=round_count(estimate))
            m.prefill_s = timer.seconds
            if self.profiler is not None:
                self.profiler.take(case, quantized.model, lambda n: [decoder.prefill(ids) for _ in range(n)], 1)

    def _decoder(self, case: Case, quantized: Quantized, ids: torch.Tensor) -> generate.Decoder:
        """A decoder of this case's shape whose logits have been seen to be finite."""
        assert case.workload is not None
        self.progress(f"{case.name}: {'warming up' if case.mode == 'eager' else 'compiling'}")
        with self.spent.on("warmup"):  # a library's kernels tune themselves in these first calls
            # one place more than is timed, for the step whose logits are looked at
            length = case.workload.context_tokens + 1
            decoder = generate.Decoder(
                quantized.model, ids.shape[0], length, TORCH_DTYPES[quantized.dtype], kv=case.format.kv
            )
            decoder.check_finite(ids, case.name)
        return decoder

    def _compiler(self, case: Case, quantized: Quantized) -> Callable[[Any], Any]:
        mode, model = case.mode or "eager", quantized.model
        flags = dict(case.format.inductor)
        if self.device.kind == "cuda" and case.rows != 1:
            flags |= case.format.cuda_matmul_inductor
        layers = list(model.model.layers)
        return lambda call: compilers.compile_call(call, mode, self.device, flags, layers, model.lm_head)

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


def cudagraph_skips(case: Case, device: Device) -> int | None:
    """How often this case's compiles gave up their CUDA graphs, which Inductor only logs; None in modes without."""
    if device.kind != "cuda" or case.mode is None or not compilers.find(case.mode).cuda_graph:
        return None
    return process_state.cudagraph_skips()


def _warming(case: Case) -> str:
    return "warmup" if case.mode == "eager" else "compile"


class RoundTimer:
    """A target that keeps its own device-synchronised seconds of each round beside pytest-benchmark's.

    ``issued`` are those until the host had issued everything.
    """

    def __init__(self, device: Device, target: Callable[[], object], after: Callable[[], None] | None = None) -> None:
        self.device, self.target, self.after = device, target, after
        self.seconds: list[float] = []
        self.issued: list[float] = []

    def __call__(self) -> None:
        measure.synchronize(self.device)
        started = time.perf_counter()
        self.target()
        issued = time.perf_counter() - started
        measure.synchronize(self.device)
        self.issued.append(issued)
        self.seconds.append(time.perf_counter() - started)
        if self.after is not None:
            self.after()


def round_count(seconds: float, budget_s: float = 2.0) -> int:
    """How many rounds to time: two seconds' worth, at least 3 and at most 15; 1 where one alone is longer."""
    return 1 if seconds > budget_s else max(3, min(15, round(budget_s / max(seconds, 1e-6))))


def prompt(vocab_size: int, batch: int, tokens: int, device: Device) -> torch.Tensor:
    """The same token ids in every run: [batch, tokens] int64, a fixed stride through the vocabulary."""
    ids = (torch.arange(batch * tokens, dtype=torch.int64) * 7919 + 1013) % vocab_size
    return ids.view(batch, tokens).to(device.torch)
