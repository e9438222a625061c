"""The pooled run-to-run spread, by hand: who shares a pool, who is left out, and how wide k makes a limit."""

from __future__ import annotations

import math
import statistics

import pytest

from lowbit.record import Record
from lowbit.spread import NO_SPREAD, Row, Spread, Values, host_bound, pool_spread, spread_factor


def row(case: str, mode: str | None = "default", kind: str = "decode", **runs: list[float]) -> Row:
    values = {name: Values(statistics.median(value), tuple(value)) for name, value in runs.items()}
    return Row(case, kind, "bf16-torch", mode, "b1_c0", "bf16", values)


def test_host_bound_is_eager_speed() -> None:
    assert host_bound(row("a", mode="eager"))
    assert not host_bound(row("a", mode="regional"))
    assert not host_bound(row("a", mode=None, kind="quality"))
    assert host_bound(Record("c", "prefill", "bf16-torch", "eager", "p512", "embedded", "auto"))


def test_a_compiled_case_is_host_bound_where_the_gpu_was_seen_to_wait() -> None:
    assert host_bound(row("a", host_share=[0.87, 0.98, 0.99]))
    assert not host_bound(row("a", host_share=[0.5, 0.56, 0.99]))
    assert not host_bound(row("a", kind="quality", host_share=[0.99]))
    measured = Record("c", "decode", "a16w8-torchao", "reduce-overhead", "b1_c0", "embedded", "auto")
    assert not host_bound(measured)
    measured.metrics["host_share"] = 0.99
    assert host_bound(measured)


def test_factor_falls_with_what_is_known() -> None:
    factors = [spread_factor(freedom, 5) for freedom in (3, 4, 8, 20, 80, 10_000)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(4.0, rel=1e-3)
    assert spread_factor(80, 2) > spread_factor(80, 5)
    assert spread_factor(1, 5) == spread_factor(3, 5)  # capped: a gate that can't fail is none
    assert spread_factor(0, 5) == 0


def test_spread_is_pooled_by_hand() -> None:
    """Variances about each case's mean, relative to its median: [99, 100, 101] and [198, 200, 202] have 1 % each."""
    rows = [row("a", decode_tok_s=[99, 100, 101]), row("b", decode_tok_s=[198, 200, 202])]
    spread = pool_spread(rows).of("decode_tok_s", rows[0])
    assert spread == Spread(pytest.approx(0.01), 4)
    rows = [row("a", vram_peak_mib=[99, 100, 101]), row("b", vram_peak_mib=[197, 200, 203])]
    assert pool_spread(rows).of("vram_peak_mib", rows[0]) == Spread(pytest.approx(math.sqrt(5)), 4)


def test_host_bound_noise_is_pooled_apart() -> None:
    rows = [row("a", decode_tok_s=[99, 100, 101]), row("b", mode="eager", decode_tok_s=[90, 100, 110])]
    spreads = pool_spread(rows)
    assert spreads.of("decode_tok_s", rows[0]).sigma == pytest.approx(0.01)
    assert spreads.of("decode_tok_s", rows[1]).sigma == pytest.approx(0.10)


def test_compiled_cases_that_wait_for_the_host_share_the_pool_of_eager_ones() -> None:
    rows = [row("a", decode_tok_s=[99, 100, 101]), row("b", decode_tok_s=[90, 100, 110], host_share=[0.99] * 3)]
    spreads = pool_spread(rows)
    assert spreads.of("decode_tok_s", rows[0]).sigma == pytest.approx(0.01)
    assert spreads.of("decode_tok_s", rows[1]).sigma == pytest.approx(0.10)


def test_one_freak_run_does_not_blind_the_others() -> None:
    rows = [row(f"case{i}", decode_tok_s=[99.8, 99.9, 100, 100.1, 100.2]) for i in range(19)]
    freak = row("freak", decode_tok_s=[99.8, 100, 100.1, 100.2, 50.0])
    spreads = pool_spread([*rows, freak])
    assert spreads.of("decode_tok_s", rows[0]) == Spread(pytest.approx(math.sqrt(0.025) / 100), 76)
    assert spreads.of("decode_tok_s", freak).degrees_of_freedom == 4
    assert spreads.of("decode_tok_s", freak).sigma > 0.2


def test_zero_medians_and_single_runs_have_no_say() -> None:
    rows = [row("a", kld_e_8tok=[0.0, 0.0]), row("b", kld_e_8tok=[0.02, 0.02]), row("c", decode_tok_s=[100.0])]
    spreads = pool_spread(rows)
    assert spreads.of("kld_e_8tok", rows[0]) == Spread(0.0, 2)
    assert spreads.of("decode_tok_s", rows[2]) == NO_SPREAD
