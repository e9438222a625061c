"""Every metric of the suite, one decorated function each: its name, unit, better direction and limit stand together.

A metric is a function from a ``Measurement`` (the raw quantities of one case) to a float. Returning ``None`` means
that the case does not have it (a prefill has no tpot). A new metric is one function here and nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Better = Literal["higher", "lower", "neither"]
MIB = 1024 * 1024


@dataclass(frozen=True)
class Limit:
    """How far a metric may move in its worse direction before it is a regression.

    The limit is ``max(absolute, relative * |baseline|, k * pooled spread)``; ``k`` is regression.py's. A metric with
    neither floor is reported and never gated. ``stderrs`` widens it to so many standard errors of the baseline's value,
    where a metric beside it (``…_stderr``) tells them.
    """

    relative: float = 0.0
    absolute: float = 0.0
    stderrs: float = 0.0


@dataclass(frozen=True)
class Metric:
    """One row of METRICS. ``kinds`` are the tests that have it; ``gated_on`` the device kinds where it can fail."""

    name: str
    unit: str
    better: Better
    limit: Limit | None
    kinds: tuple[str, ...]
    gated_on: tuple[str, ...]
    host_bound_limit: Limit | None
    compute: Callable[[Measurement], float | None]
    description: str


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
    ``yardstick_s`` one per round: fixed host work timed just before that round, which a CPU's drift is divided by.
    """

    kind: str
    batch: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    yardstick_s: list[float] = field(default_factory=list)
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


METRICS: dict[str, Metric] = {}

SPEED = ("prefill", "decode")
EVERY = ("prefill", "decode", "quality")


def metric(
    unit: str,
    better: Better,
    limit: Limit | None = None,
    kinds: tuple[str, ...] = SPEED,
    gated_on: tuple[str, ...] = ("cuda", "cpu"),
    host_bound_limit: Limit | None = None,
) -> Callable[[Callable[[Measurement], float | None]], Callable[[Measurement], float | None]]:
    """Register the function below as the metric of its name."""

    def register(compute: Callable[[Measurement], float | None]) -> Callable[[Measurement], float | None]:
        name, text = compute.__name__, (compute.__doc__ or "").strip()
        METRICS[name] = Metric(name, unit, better, limit, kinds, gated_on, host_bound_limit, compute, text)
        return compute

    return register


HOST_BOUND = Limit(relative=0.10)  # eager decode waits for Python, not for the card


@metric("tok/s", "higher", Limit(relative=0.02), ("decode",), gated_on=("cuda",), host_bound_limit=HOST_BOUND)
def decode_tok_s(m: Measurement) -> float | None:
    """Decoded tokens of the whole batch / decode time (median round)."""
    return m.batch * m.new_tokens / m.decode if m.decode else None


@metric("ratio", "higher", Limit(relative=0.25), gated_on=("cpu",))
def speed_ratio(m: Measurement) -> float | None:
    """Speed in units of the host's own: median over rounds of (yardstick time just before the round / round time)."""
    rounds = m.decode_s or m.prefill_s
    if not m.yardstick_s or len(m.yardstick_s) != len(rounds):
        return None
    return statistics.median(y / r for y, r in zip(m.yardstick_s, rounds, strict=True))


def _percentile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


@metric("ms", "lower", kinds=("decode",))
def tpot_ms_p50(m: Measurement) -> float | None:
    """Time per output token: the median decoded step."""
    return _ms(_percentile(m.step_s, 0.50))


@metric("ms", "lower", kinds=("decode",))
def tpot_ms_p90(m: Measurement) -> float | None:
    """Time per output token, 90th percentile of the steps."""
    return _ms(_percentile(m.step_s, 0.90))


@metric("ms", "lower", kinds=("decode",))
def tpot_ms_p99(m: Measurement) -> float | None:
    """Time per output token, 99th percentile of the steps."""
    return _ms(_percentile(m.step_s, 0.99))


@metric("ms", "lower", Limit(relative=0.03), ("prefill",), gated_on=("cuda",), host_bound_limit=HOST_BOUND)
def ttft_ms(m: Measurement) -> float | None:
    """Time to first token: the prefill, from prompt on the device to the first token on the device (median round)."""
    return _ms(m.prefill)


@metric("ms", "lower", kinds=("decode",))
def prompt_ttft_ms(m: Measurement) -> float | None:
    """ttft of a decode case's own prompt, prefilled eagerly: reported, gated by the prefill cases."""
    return _ms(m.prefill)


@metric("tok/s", "higher")
def prefill_tok_s(m: Measurement) -> float | None:
    """Prompt tokens of the whole batch / prefill time."""
    return m.batch * m.prompt_tokens / m.prefill if m.prefill else None


@metric("tok/s", "higher", kinds=("decode",))
def throughput_tok_s(m: Measurement) -> float | None:
    """Decoded tokens / (prefill + decode time)."""
    return m.batch * m.new_tokens / (m.prefill + m.decode) if m.prefill and m.decode else None


@metric("ms", "lower", kinds=("decode",))
def latency_ms(m: Measurement) -> float | None:
    """Prefill + decode time of one request."""
    return _ms(m.prefill + m.decode) if m.prefill and m.decode else None


@metric("MiB", "lower", Limit(relative=1e-9), EVERY)
def weights_mib(m: Measurement) -> float | None:
    """Bytes of all parameters and buffers resident on the device, counted from their storages: deterministic."""
    return None if m.weights_bytes is None else m.weights_bytes / MIB


@metric("bit", "lower", Limit(relative=1e-9), EVERY)
def bits_per_weight(m: Measurement) -> float | None:
    """Bits stored per weight of the quantized linears, scales and zeros included, counted from their storages."""
    return m.bits_per_weight


@metric("B/tok", "lower", Limit(relative=1e-9), ("decode",))
def kv_bytes_per_tok(m: Measurement) -> float | None:
    """Bytes of KV cache per position and sequence in all layers, scales included, counted from the cache's tensors."""
    return m.kv_bytes_per_token


@metric("MiB", "lower", kinds=("decode",))
def kv_cache_mib(m: Measurement) -> float | None:
    """The KV cache of this case at its full context: bytes per token * batch * (prompt + new tokens)."""
    if m.kv_bytes_per_token is None:
        return None
    return m.kv_bytes_per_token * m.batch * (m.prompt_tokens + m.new_tokens) / MIB


@metric("MiB", "lower", Limit(absolute=64))
def vram_peak_mib(m: Measurement) -> float | None:
    """Peak of this process in the measured rounds by NVML, less what earlier cases left loaded in the process."""
    return m.vram_peak_mib


@metric("MiB", "lower")
def vram_alloc_peak_mib(m: Measurement) -> float | None:
    """Peak of torch's allocator in the measured rounds."""
    return m.vram_alloc_peak_mib


@metric("MiB", "lower")
def vram_quantize_peak_mib(m: Measurement) -> float | None:
    """Peak of torch's allocator while the format was being made."""
    return m.vram_quantize_peak_mib


@metric("MiB", "lower")
def vram_start_mib(m: Measurement) -> float | None:
    """This process by NVML before the format was made."""
    return m.vram_start_mib


@metric("MiB", "lower")
def vram_end_mib(m: Measurement) -> float | None:
    """This process by NVML after the case, its caches released: a leak shows as growth over the run."""
    return m.vram_end_mib


@metric("J/tok", "lower", Limit(relative=0.05), ("decode",), host_bound_limit=HOST_BOUND)
def energy_j_per_tok(m: Measurement) -> float | None:
    """Joules of the whole card (NVML's total-energy counter) per decoded token, over the energy window."""
    return m.energy_j / m.energy_tokens if m.energy_j is not None and m.energy_tokens else None


@metric("share", "higher", kinds=("decode",))
def mbu(m: Measurement) -> float | None:
    """Model bandwidth utilisation: (weight + KV bytes read per step) * steps/s / measured read bandwidth."""
    if not (m.streamed_bytes_per_step and m.decode and m.read_gb_s):
        return None
    return m.streamed_bytes_per_step * m.new_tokens / m.decode / (m.read_gb_s * 1e9)


@metric("share", "higher", kinds=("prefill",))
def mfu(m: Measurement) -> float | None:
    """Model FLOP utilisation: FLOP of the prefill / time / measured bf16 matrix rate."""
    if not (m.prefill_flop and m.prefill and m.matmul_tflop_s):
        return None
    return m.prefill_flop / m.prefill / (m.matmul_tflop_s * 1e12)


@metric("s", "lower", kinds=EVERY)
def load_s(m: Measurement) -> float | None:
    """Reading the weights into host memory, once a session."""
    return m.load_s


@metric("s", "lower", kinds=EVERY)
def quantize_s(m: Measurement) -> float | None:
    """From the master in host memory to the quantized model on the device, copies included."""
    return m.quantize_s


@metric("s", "lower", Limit(relative=0.50, absolute=5.0), gated_on=("cuda",))
def compile_s(m: Measurement) -> float | None:
    """First compiled call less a later one: Dynamo, Inductor, autotune and graph capture (0 in eager mode)."""
    return m.compile_s


@metric("count", "lower", Limit(absolute=0.5))
def graph_breaks(m: Measurement) -> float | None:
    """Graph breaks that Dynamo counted."""
    return None if m.graph_breaks is None else float(m.graph_breaks)


@metric("count", "lower", Limit(absolute=0.5))
def recompiles(m: Measurement) -> float | None:
    """Recompilations after the first compile of the case."""
    return None if m.recompiles is None else float(m.recompiles)


@metric("", "lower", Limit(relative=0.001), ("quality",))
def ppl(m: Measurement) -> float | None:
    """Token perplexity in non-overlapping windows; stored as ppl_<protocol>."""
    return m.quality.ppl if m.quality else None


@metric("nat", "lower", Limit(relative=0.05, absolute=1e-6), ("quality",))
def kld(m: Measurement) -> float | None:
    """Mean KL divergence of bf16's next-token distribution from this format's; stored as kld_<protocol>_<n>tok."""
    return m.quality.kld if m.quality else None


@metric("share", "higher", kinds=("quality",))
def top1(m: Measurement) -> float | None:
    """Share of positions where the arg max equals bf16's; stored as top1_<protocol>_<n>tok."""
    return m.quality.top1 if m.quality else None


@metric("nat", "lower", kinds=("quality",))
def ln_ppl_ratio(m: Measurement) -> float | None:
    """Paired ln(PPL / PPL of bf16); stored as ln_ppl_ratio_<protocol>."""
    return m.quality.ln_ppl_ratio if m.quality else None


@metric("MB", "lower", Limit(relative=1e-9), ("quality",))
def checkpoint_mb(m: Measurement) -> float | None:
    """Bytes of the quantized model's state as safetensors would hold them, in 10^6 bytes."""
    return None if m.checkpoint_bytes is None else m.checkpoint_bytes / 1e6


@metric("ratio", "lower", Limit(relative=0.50, absolute=1e-4), ("quality",))
def kernel_rel_error(m: Measurement) -> float | None:
    """Largest relative error of a row of a linear's output against the product with the format's own weights.

    Of one linear of each kind (lowbit/truth.py). Beyond the compute dtype's bound the case fails by itself; the limit
    here tells an upgrade that rounds more often.
    """
    return m.kernel_error


PROTOCOL_METRICS = ("ppl", "kld", "top1", "ln_ppl_ratio")


# -- lm-evaluation-harness ---------------------------------------------------------------------------------------------

EVALUATED = ("word_perplexity", "byte_perplexity", "bits_per_byte", "acc", "acc_norm")
"""What is kept of the harness's figures, by its own names; stored as eval_<name>_<task>_<n>docs."""

OF_ACCURACY = Limit(absolute=0.002, stderrs=1.0)


def _evaluated(m: Measurement, name: str) -> float | None:
    return m.evaluation.values.get(name) if m.evaluation else None


@metric("", "lower", Limit(relative=0.001), ("eval",))
def eval_word_perplexity(m: Measurement) -> float | None:
    """The harness's perplexity per word of the original text."""
    return _evaluated(m, "word_perplexity")


@metric("", "lower", kinds=("eval",))
def eval_byte_perplexity(m: Measurement) -> float | None:
    """The harness's perplexity per byte."""
    return _evaluated(m, "byte_perplexity")


@metric("bit", "lower", kinds=("eval",))
def eval_bits_per_byte(m: Measurement) -> float | None:
    """log2 of the perplexity per byte."""
    return _evaluated(m, "bits_per_byte")


@metric("share", "higher", OF_ACCURACY, ("eval",))
def eval_acc(m: Measurement) -> float | None:
    """Share of questions where the likeliest answer is the right one."""
    return _evaluated(m, "acc")


@metric("share", "higher", OF_ACCURACY, ("eval",))
def eval_acc_norm(m: Measurement) -> float | None:
    """The same, log-likelihoods divided by the answers' lengths."""
    return _evaluated(m, "acc_norm")


@metric("share", "neither", kinds=("eval",))
def eval_acc_stderr(m: Measurement) -> float | None:
    """Standard error of eval_acc over the questions, by the harness."""
    return m.evaluation.stderr.get("acc") if m.evaluation else None


@metric("share", "neither", kinds=("eval",))
def eval_acc_norm_stderr(m: Measurement) -> float | None:
    """Standard error of eval_acc_norm."""
    return m.evaluation.stderr.get("acc_norm") if m.evaluation else None


def derive(measurement: Measurement) -> dict[str, float]:
    """All metrics that this measurement has, under their stored names."""
    values: dict[str, float] = {}
    for row in METRICS.values():
        if measurement.kind not in row.kinds:
            continue
        value = row.compute(measurement)
        if value is not None:
            values[_stored_name(row.name, measurement)] = float(value)
    for further in measurement.further_quality:  # behind the first, by which formats are compared
        shown = replace(measurement, quality=further)
        scored = {name: METRICS[name].compute(shown) for name in PROTOCOL_METRICS}
        values |= {_stored_name(name, shown): float(value) for name, value in scored.items() if value is not None}
    return values


def _stored_name(name: str, m: Measurement) -> str:
    if m.evaluation is not None and name.startswith("eval_"):
        return f"{name}_{m.evaluation.task}_{m.evaluation.docs}docs"
    if name not in PROTOCOL_METRICS or m.quality is None:
        return name
    suffix = f"_{m.quality.kld_tokens}tok" if name in ("kld", "top1") else ""
    return f"{name}_{m.quality.protocol}{suffix}"


def find(stored_name: str) -> Metric | None:
    """The row behind a stored name, ``ppl_wikitext2_2048`` → ``ppl``; None for a name of another version."""
    if stored_name in METRICS:
        return METRICS[stored_name]
    families = [*PROTOCOL_METRICS, *(name for name in METRICS if name.startswith("eval_"))]
    found = [name for name in families if stored_name.startswith(name + "_")]
    return METRICS[max(found, key=len)] if found else None


def stderr_of(stored_name: str) -> str | None:
    """Under which stored name a metric's standard error stands; None for one without."""
    metric = find(stored_name)
    if metric is None or metric.limit is None or not metric.limit.stderrs:
        return None
    return f"{metric.name}_stderr{stored_name.removeprefix(metric.name)}"
