"""The Bench of a real search: KL, products and decode steps of a Lab's model on its device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lowbit import calibration, compilers, measure, models, quality, texts, workloads
from lowbit.auto.chain import product_s
from lowbit.cases import ON_REQUEST, Case
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet
from lowbit.metrics import Measurement
from lowbit.quantized import Quantized
from lowbit.scoring import Scorer, base_format
from lowbit.spent import Spent
from lowbit.timing import Stopwatch, prompt

WINDOWS = 4
"""Of the calibration text: 2,044 positions of the embedded model, 8,188 of a real one."""

MODES = ("native", "reduce-overhead", "regional", "eager")
"""Compile modes to decode in, the first that a format has and that runs here: by what an H200 has shown."""

MAX_ROUNDS = 5


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

    def unmet(self, case: Case) -> Unmet | None: ...

    def make(self, host: models.HostModel, fmt: Format) -> Quantized: ...


class LabBench:
    """See lowbit.auto.search.Bench."""

    def __init__(self, lab: Workplace) -> None:
        self.lab = lab
        self.layers = int(lab.host_config.num_hidden_layers)
        self.dtype = lab.device.dtype_for(base_format(lab.device)) or "fp16"
        self.workload = workloads.select("decode", "quick", lab.choice.parameters)[0]
        self.mix_mode = self.mode(base_format(lab.device))
        self._scorer: Scorer | None = None

    def clock(self) -> float:
        return time.perf_counter()

    def _case(self, fmt: Format, mode: str) -> Case:
        return Case("decode", fmt, mode, self.workload)

    def mode(self, fmt: Format) -> str:
        """The first of MODES that the row has (``native`` where it names it) and that runs here."""
        reasons = []
        for name in MODES:
            if not has_mode(fmt, name):
                continue
            reason = self.lab.unmet(self._case(fmt, name))
            if reason is None:
                return name
            reasons.append(str(reason))
        raise LowbitError("; ".join(dict.fromkeys(reasons)) or f"runs under {', '.join(fmt.modes)} alone")

    def mixes(self, fmt: Format) -> bool:
        """Whether the row has the mode and the base dtype of a mix."""
        able = has_mode(fmt, self.mix_mode) and self.dtype in fmt.dtypes
        return able and self.lab.unmet(self._case(fmt, self.mix_mode)) is None

    def kld(self, fmt: Format) -> float:
        """On the calibration text, of the model that quality is scored with."""
        lab, host = self.lab, self.lab.quality_host
        if self._scorer is None:
            tokens = calibration.tokens(host, lab.source, WINDOWS)
            held = _Held(quality.Text("calibration", tokens.flatten(), tokens.shape[1]))
            self._scorer = Scorer(lab.device, held, lab.vram, lab.progress)  # type: ignore[arg-type]
        reference = self._scorer.reference(host)
        made = lab.make(host, fmt)
        with lab.spent.on("quality"), compilers.preserved_state(), measure.cpu_threads(lab.device):
            scored = quality.score(made.model, self._scorer.text(host), reference, source=fmt.id)
        assert scored.kld is not None
        return scored.kld

    def product_s(self, fmt: Format) -> Mapping[str, float]:
        """By lowbit.auto.chain, compiled as the mix would be."""
        with self.lab.spent.on("measure"):
            found = product_s(fmt, self.dtype, self.mix_mode, self.lab.device, self.lab.host_config)
            self.lab.vram.release()
        return found

    def step_s(self, fmt: Format) -> float:
        """As a decode case measures it: the median of a few rounds, over its tokens."""
        lab = self.lab
        case = self._case(fmt, self.mode(fmt))
        made = lab.make(lab.host, fmt)
        watch = Stopwatch(lab.device, None, lab.vram, lab.spent, lab.progress)
        taken = Measurement(
            "decode", batch=1, prompt_tokens=self.workload.prompt_tokens, new_tokens=self.workload.new_tokens
        )
        ids = prompt(lab.host_config.vocab_size, 1, self.workload.prompt_tokens, lab.device)
        with compilers.preserved_state(), measure.cpu_threads(lab.device):
            watch.time_decode(case, made, ids, taken, _few_rounds)
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
