"""Loaded: one device, one model in host memory, at most one format of it alive on the device; what can run there."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit import backends, calibration, compilers, measure, models, quantized, scoring, texts, vram_limit
from lowbit.backends import native
from lowbit.cases import Case
from lowbit.ceilings import Ceilings, measure_ceilings
from lowbit.device import MIB, Device
from lowbit.errors import LoadError, LowbitError
from lowbit.formats import Format, Unmet
from lowbit.nvml import Nvml, NvmlUnavailable
from lowbit.quantized import Quantized
from lowbit.quiet import quiet_import
from lowbit.spent import Spent
from lowbit.timing import Progress


@dataclass
class Loaded:
    """A device and a model for it. ``progress`` is told, in a few words, what is being waited for.

    ``source`` is the text that quality is scored on. With dummy weights, quality is the embedded model's under the
    same format on the same device: the dummy model's own would be a number about noise.
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
        self._ceilings: Ceilings | None = None
        self.nvml: Nvml | None = None
        self.nvml_unavailable = ""
        try:
            self.nvml = Nvml.open(self.device)
        except NvmlUnavailable as error:
            self.nvml_unavailable = str(error)
        if self.device.kind == "cuda":
            torch.cuda.set_device(self.device.torch)  # events, graphs and Triton launches go to the current device
            vram_limit.enforce(self.device.torch, self.device.limit_mib)
        self.vram = measure.VramMeter(self.device, self.nvml)

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
        self._host = self._embedded = None
        self._free()
        gc.unfreeze()
        if self.nvml is not None:
            self.nvml.close()

    def unmet(self, case: Case) -> Unmet | None:
        """Why this case can't run here, or None. Needs no weights."""
        config = self.host_config
        reason = backends.unmet(case.format, self.device, config)
        if reason is None:
            reason = compilers.case_unmet(case, self.device)
        if reason is None and case.mode == "native" and case.workload is not None and case.kind == "decode":
            reason = native.step_unmet(case.format, self.device, config, case.workload.batch)
        if reason is None and case.workload is not None:
            limit = getattr(config, "max_position_embeddings", None)
            if limit is not None and case.workload.context_tokens > limit:
                reason = Unmet(
                    "shape", f"{case.workload.id} needs {case.workload.context_tokens} positions, the model has {limit}"
                )
        if reason is None and (case.kind != "quality" or self.choice.load_format != "dummy"):
            reason = self._too_large(case)
            if reason is not None:  # what a failed test's traceback held is freed by a collection only
                self.vram.release()
                reason = self._too_large(case)
        return reason

    def _too_large(self, case: Case) -> Unmet | None:
        config = self.host_config
        held_mib = 0.0 if self._current is None else self._current.coverage.resident_bytes / MIB
        scored = case.kind == "quality"
        scratch_mib = scoring.scoring_mib(case.format, config, self.source.window) if scored else 0.0
        return quantized.too_large(case.format, config, case.workload, self.device, held_mib, scratch_mib=scratch_mib)

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
