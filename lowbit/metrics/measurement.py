"""The raw quantities of one case, before any metric is made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

MIB = 1024 * 1024


@dataclass
class Quality:
    """Quality of one format on one text. Field names of the metrics carry the protocol and the token counts.

    ``protocol`` is e.g. ``embedded_512`` or ``wikitext2_2048`` (text, window). ``kld`` is the mean KL divergence in
    nats of the base dtype's next-token distribution from the format's, over ``kld_tokens`` positions; ``top1`` the
    share of those where both arg max agree; ``ln_ppl_ratio`` the paired ln(PPL_format / PPL_base) over the
    ``tokens`` scored and ``ln_ppl_ratio_stderr`` its standard error.
    """

    protocol: str
    tokens: int
    ppl: float
    kld_tokens: int
    kld: float | None = None
    top1: float | None = None
    ln_ppl_ratio: float | None = None
    ln_ppl_ratio_stderr: float | None = None


@dataclass
class Evaluation:
    """One task of lm-evaluation-harness on one format: its ``docs`` documents' figures, standard errors where given."""

    task: str
    docs: int
    values: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)


@dataclass
class Measurement:
    """The raw quantities of one case. Times in seconds, sizes in bytes unless the name says MiB; None = not taken.

    ``prefill_s`` and ``decode_s`` hold one entry per round, ``step_s`` one per decoded step over all rounds,
    ``yardstick_s`` one per round: fixed host work timed just before that round, which a CPU's drift is divided by;
    ``issue_s`` one per round on a GPU: until its last step was issued. ``attention`` says how lowbit's own read which
    cache, "" where it did not.
    """

    kind: str
    batch: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    yardstick_s: list[float] = field(default_factory=list)
    issue_s: list[float] = field(default_factory=list)
    attention: str = ""
    streamed_bytes_per_step: float | None = None
    kv_bytes_per_token: float | None = None
    prefill_flop: float | None = None
    read_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    weights_bytes: int | None = None
    bits_per_weight: float | None = None
    kernel_error: float | None = None
    checkpoint_bytes: int | None = None
    vram_start_mib: float | None = None
    vram_end_mib: float | None = None
    vram_peak_mib: float | None = None
    vram_alloc_peak_mib: float | None = None
    vram_quantize_peak_mib: float | None = None
    energy_j: float | None = None
    energy_tokens: int | None = None
    load_s: float | None = None
    copy_s: float | None = None
    quantize_s: float | None = None
    compile_s: float | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None
    compiled_anew: int | None = None
    quality: Quality | None = None
    further_quality: list[Quality] = field(default_factory=list)
    evaluation: Evaluation | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def prefill(self) -> float | None:
        return statistics.median(self.prefill_s) if self.prefill_s else None

    @property
    def decode(self) -> float | None:
        return statistics.median(self.decode_s) if self.decode_s else None
