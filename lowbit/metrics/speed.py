"""Speed: tokens per second, times per token and to the first one."""

from __future__ import annotations

import statistics

from lowbit.metrics.measurement import Measurement
from lowbit.metrics.row import HOST_BOUND, Limit, metric


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


@metric("ratio", "lower", kinds=("decode",))
def host_share(m: Measurement) -> float | None:
    """Part of a round in which the host was still issuing work to the GPU (median round): near 1 the GPU waits for
    Python, and whatever else runs on the host shows in the speed."""
    if not m.issue_s or len(m.issue_s) != len(m.decode_s):
        return None
    return statistics.median(issued / r for issued, r in zip(m.issue_s, m.decode_s, strict=True))


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
