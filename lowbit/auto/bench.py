"""The Bench of a real search: KL, products and decode steps of a Lab's model on its device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from lowbit import calibration, generate, measure, models, native_times, process_state, quality, texts, workloads
from lowbit.auto.chain import product_s
from lowbit.auto.ground import Ground, Timed
from lowbit.cases import ON_REQUEST, Case
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, Unmet, auto
from lowbit.metrics import Measurement
from lowbit.quantized import TORCH_DTYPES, Quantized
from lowbit.scoring import Scorer, base_format
from lowbit.spent import Spent
from lowbit.timing import Stopwatch, prompt

WINDOWS = quality.REFERENCE_WINDOWS
"""Of the calibration text, for what may be chosen: as many as it is judged by later. On 4, KL of mixes in int2 has a
standard error of 18 % (docs/findings.md)."""

PROBED_WINDOWS = 4
"""For a group of linears alone, whose KL only helps to plan."""

MODES = ("native", "reduce-overhead", "regional", "eager")
"""Compile modes to decode in, the first that a format has and that runs here."""

GRAPH_MODES = ("native", "regional", "reduce-overhead", "eager")
"""The same where a GPU replays graphs: one layer is compiled in 2 to 6 s where the whole step takes 15 to 50; an H200
decodes bf16 within 0.5 % as fast by it, and torchao's rows faster (docs/findings.md)."""

MAX_ROUNDS = 5

NATIVE_LENGTH = 256
"""Of the cache beside which single kernels are timed."""


def has_mode(fmt: Format, mode: str) -> bool:
    """Whether a row is measured under this compile mode, as cases.enumerate_cases says."""
    return mode in fmt.modes if fmt.modes else mode not in ON_REQUEST


class Workplace(Protocol):
    """What a Bench needs of a Lab."""

    device: Device
    choice: models.Choice
    source: texts.Source
    spent: Spent
    vram: measure.VramMeter

    @property
    def progress(self) -> Callable[[str], None]: ...

    @property
    def host(self) -> models.HostModel: ...

    @property
    def quality_host(self) -> models.HostModel: ...

    @property
    def host_config(self) -> Any: ...

    def begin(self) -> None: ...

    def unmet(self, case: Case) -> Unmet | None: ...

    def make(self, host: models.HostModel, fmt: Format) -> Quantized: ...


class LabBench:
    """See lowbit.auto.search.Bench."""

    def __init__(self, lab: Workplace) -> None:
        self.lab = lab
        self.modes = GRAPH_MODES if lab.device.kind == "cuda" else MODES
        self.layers = int(lab.host_config.num_hidden_layers)
        self.workload = workloads.select("decode", "quick", lab.choice.parameters)[0]
        self.stands_in = lab.choice.load_format == "dummy"
        base = base_format(lab.device)
        compiled = Ground(self.mode(base), lab.device.dtype_for(base) or "fp16", self._groups(auto.GROUPS))
        native = Ground("native", "fp16", self._groups(auto.NATIVE_GROUPS), whole=True)
        rows = [row for row in FORMATS.values() if row.backend == "lowbit" and row.quantized]
        able = any(self.mixes(row, native) for row in rows)
        self.grounds: Sequence[Ground] = (native, compiled) if able else (compiled,)
        self._scorer: Scorer | None = None

    def _groups(self, among: auto.Groups) -> auto.Groups:
        """Where the embedded model stands in for KL no layer has a format of its own: first and last are half of its
        four, and a sixteenth of an 8B's, whose other layers would look twice as good as they are."""
        return auto.every_layer(among) if self.stands_in else among

    def clock(self) -> float:
        return time.perf_counter()

    def _case(self, fmt: Format, mode: str) -> Case:
        return Case("decode", fmt, mode, self.workload)

    def mode(self, fmt: Format) -> str:
        """The first of ``modes`` that the row has (``native`` where it names it) and that runs here."""
        reasons = []
        for name in self.modes:
            if not has_mode(fmt, name):
                continue
            reason = self.lab.unmet(self._case(fmt, name))
            if reason is None:
                return name
            reasons.append(str(reason))
        raise LowbitError("; ".join(dict.fromkeys(reasons)) or f"runs under {', '.join(fmt.modes)} alone")

    def rank(self, fmt: Format) -> int:
        """The place of the format's mode among ``modes``: what is measured soonest and was fastest first."""
        try:
            return self.modes.index(self.mode(fmt))
        except LowbitError:
            return len(self.modes)

    def mixes(self, fmt: Format, ground: Ground) -> bool:
        """Whether the row has the ground's mode and base dtype."""
        able = has_mode(fmt, ground.mode) and ground.dtype in fmt.dtypes
        return able and self.lab.unmet(self._case(fmt, ground.mode)) is None

    def kld(self, fmt: Format) -> float:
        """On the calibration text, of the model that quality is scored with: beside dummy weights, the embedded one."""
        return self._kld(fmt, WINDOWS)

    def probe_kld(self, fmt: Format) -> float:
        return self._kld(fmt, PROBED_WINDOWS)

    def _kld(self, fmt: Format, windows: int) -> float:
        lab, host = self.lab, self.lab.quality_host
        if self._scorer is None:
            tokens = calibration.tokens(host, lab.source, WINDOWS)
            held = _Held(quality.Text("calibration", tokens.flatten(), tokens.shape[1]))
            self._scorer = Scorer(lab.device, held, lab.vram, lab.progress)  # type: ignore[arg-type]
        reference = self._scorer.reference(host)
        made = lab.make(host, fmt)
        with lab.spent.on("quality"), process_state.preserved_state(), measure.cpu_threads(lab.device):
            scored = quality.score(made.model, self._scorer.text(host), reference, max_windows=windows, source=fmt.id)
        assert scored.kld is not None
        return scored.kld

    def timed(self, fmt: Format, ground: Ground) -> Timed:
        """By lowbit.auto.chain, compiled as the mix would be; lowbit's own kernels one by one, in the whole model."""
        if ground.mode == "native":
            return self._timed_natively(fmt)
        with self.lab.spent.on("measure"):
            found = product_s(fmt, ground.dtype, ground.mode, self.lab.device, self.lab.host_config)
            self.lab.vram.release()
        return Timed(found)

    def _timed_natively(self, fmt: Format) -> Timed:
        lab = self.lab
        made = lab.make(lab.host, fmt)
        step_s = self._decoded_s(fmt, made)
        length = min(NATIVE_LENGTH, lab.host_config.max_position_embeddings)
        decoder = generate.Decoder(made.model, 1, length, TORCH_DTYPES[made.dtype])
        with lab.spent.on("measure"), process_state.preserved_state():
            decoder.run_natively(self._prompt(), fmt.id, lab.progress)
            found = native_times.operations(decoder.native, made.model)
        return Timed(native_times.product_s(found, fmt, lab.host_config), step_s)

    def step_s(self, fmt: Format) -> float:
        """As a decode case measures it: the median of a few rounds, over its tokens."""
        return self._decoded_s(fmt, self.lab.make(self.lab.host, fmt))

    def _prompt(self) -> torch.Tensor:
        return prompt(self.lab.host_config.vocab_size, 1, self.workload.prompt_tokens, self.lab.device)

    def _decoded_s(self, fmt: Format, made: Quantized) -> float:
        lab = self.lab
        watch = Stopwatch(lab.device, None, lab.vram, lab.spent, lab.progress)
        taken = Measurement(
            "decode", batch=1, prompt_tokens=self.workload.prompt_tokens, new_tokens=self.workload.new_tokens
        )
        with process_state.preserved_state(), measure.cpu_threads(lab.device):
            watch.time_decode(self._case(fmt, self.mode(fmt)), made, self._prompt(), taken, _few_rounds)
        return statistics.median(taken.decode_s) / self.workload.new_tokens

    def close(self) -> None:
        """Free the reference logits."""
        if self._scorer is not None:
            self._scorer.close()


def _few_rounds(target: Callable[[], object], setup: Callable[[], object], rounds: int) -> None:
    for _ in range(min(rounds, MAX_ROUNDS)):
        setup()
        target()


class _Held:
    """A text at hand, where a Scorer expects one to load."""

    def __init__(self, text: quality.Text) -> None:
        self.text = text

    def load(self, tokenizer: Any) -> quality.Text:
        return self.text
