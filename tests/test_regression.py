"""The gate's decisions: directions, limits, wording, and by simulation how often it is wrong."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest

from lowbit import metrics, simulation
from lowbit.record import Record
from lowbit.regression import (
    REPEATS,
    Blunt,
    Verdict,
    blunt_words,
    confirm,
    find_blunt,
    judge,
    limit_for,
    message,
    suspicions,
    undecided,
)
from lowbit.spread import NO_SPREAD, Row, Spread, Spreads, Values, pool_spread, spread_factor

CASE = "benches/test_decode.py::test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]"


def row(case: str = CASE, mode: str | None = "reduce-overhead", kind: str = "decode", **runs: list[float]) -> Row:
    values = {name: Values(statistics.median(value), tuple(value)) for name, value in runs.items()}
    return Row(case, kind, "a16w4_g128-torchao", mode, "b1_c0", "bf16", values)


def record(metrics: dict[str, float], **fields: Any) -> Record:
    return Record(CASE, "decode", "a16w4_g128-torchao", None, "b1_c0", "embedded", "auto", metrics=metrics, **fields)


def repeats(name: str, *values: float) -> list[Record]:
    return [record({name: value}) for value in values]


def verdict(now: float, device_kind: str = "cuda", spreads: Spreads | None = None, **runs: list[float]) -> Verdict:
    """The verdict of the one metric in ``runs``."""
    baseline = row(**runs)
    (only,) = judge(record(dict.fromkeys(runs, now)), baseline, spreads or Spreads(), device_kind)
    return only


@pytest.mark.parametrize(
    ("name", "baseline", "now", "status"),
    [
        ("decode_tok_s", 100.0, 97.9, "regression"),
        ("decode_tok_s", 100.0, 98.1, "ok"),
        ("decode_tok_s", 100.0, 102.1, "improvement"),
        ("vram_peak_mib", 1000.0, 1065.0, "regression"),
        ("vram_peak_mib", 1000.0, 1063.0, "ok"),
        ("vram_peak_mib", 1000.0, 935.0, "improvement"),
        ("weights_mib", 1000.0, 1000.001, "regression"),
        ("weights_mib", 1000.0, 1000.0, "ok"),
        ("ppl_embedded_512", 10.0, 10.011, "regression"),
        ("ppl_embedded_512", 10.0, 10.009, "ok"),
        ("kld_embedded_512_8192tok", 0.0, 0.9e-6, "ok"),
        ("kld_embedded_512_8192tok", 0.0, 1.1e-6, "regression"),
        ("kld_embedded_512_8192tok", 0.02, 0.0211, "regression"),
        ("graph_breaks", 0.0, 1.0, "regression"),
        ("compile_s", 1.0, 5.9, "ok"),
        ("compile_s", 20.0, 31.0, "regression"),
        ("tpot_ms_p50", 4.0, 400.0, "ungated"),
        ("metric_of_tomorrow", 4.0, 400.0, "ungated"),
    ],
)
def test_direction_and_floors(name: str, baseline: float, now: float, status: str) -> None:
    assert verdict(now, **{name: [baseline]}).status == status


def test_ttft_is_gated_where_it_is_lower_better() -> None:
    baseline = row(kind="prefill", ttft_ms=[20.0])
    assert [v.status for v in judge(record({"ttft_ms": 20.7}), baseline, Spreads(), "cuda")] == ["regression"]
    assert [v.status for v in judge(record({"ttft_ms": 20.5}), baseline, Spreads(), "cuda")] == ["ok"]


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["decode_tok_s", "ppl_embedded_512", "vram_peak_mib"])
def test_not_finite_is_a_regression_with_a_clear_text(name: str, now: float) -> None:
    bad = verdict(now, **{name: [100.0, 101.0]})
    assert bad.status == "regression"
    assert bad.fails
    assert "not a finite number" in message(CASE, "nvidia-h200", bad)
    (confirmed,) = confirm([bad], repeats(name, now, now))
    assert confirmed.fails
    assert confirmed.beyond == 3


def test_cpu_gates_the_ratio_and_never_the_wall_clock() -> None:
    assert verdict(50.0, "cpu", decode_tok_s=[100.0]).status == "ungated"
    assert verdict(0.7, "cpu", speed_ratio=[1.0]).status == "regression"
    assert verdict(0.8, "cpu", speed_ratio=[1.0]).status == "ok"
    assert verdict(0.7, "cuda", speed_ratio=[1.0]).status == "ungated"
    assert verdict(11.0, "cpu", ppl_embedded_512=[10.0]).status == "regression"


def test_eager_speed_is_the_hosts() -> None:
    eager = row(mode="eager", decode_tok_s=[100.0])
    assert [v.status for v in judge(record({"decode_tok_s": 91.0}), eager, Spreads(), "cuda")] == ["ok"]
    assert [v.status for v in judge(record({"decode_tok_s": 89.0}), eager, Spreads(), "cuda")] == ["regression"]


def test_missing_new_and_ungated() -> None:
    baseline = row(energy_j_per_tok=[0.9], mbu=[0.8], weights_mib=[100.0])
    values = {"weights_mib": 100.0, "vram_peak_mib": 200.0}
    measured = record(values, unavailable={"energy_j_per_tok": "NVML is gone"})
    found = {v.metric: v for v in judge(measured, baseline, Spreads(), "cuda")}
    assert {name: v.status for name, v in found.items()} == {
        "energy_j_per_tok": "missing",
        "mbu": "ungated",
        "weights_mib": "ok",
        "vram_peak_mib": "new",
    }
    assert [name for name, v in found.items() if v.fails] == ["energy_j_per_tok"]
    text = message(CASE, "nvidia-h200", found["energy_j_per_tok"])
    assert text.endswith("energy_j_per_tok 0.9000 J/tok -> missing (NVML is gone)")
    assert "not in the baseline" in message(CASE, "nvidia-h200", found["vram_peak_mib"])


def test_message_is_worded_as_promised() -> None:
    (final,) = confirm([verdict(241.0, decode_tok_s=[268.7])], repeats("decode_tok_s", 240.0, 243.0))
    assert message(CASE, "nvidia-h200", final) == (
        "decode[a16w4_g128-torchao-reduce-overhead-b1_c0] on nvidia-h200: "
        "decode_tok_s 268.7 -> 241.0 tok/s (-10.3 %, limit 2.0 %, 3 of 3 runs)"
    )


@pytest.mark.parametrize(
    ("name", "baseline", "now", "end"),
    [
        ("vram_peak_mib", 1000.0, 1100.0, "vram_peak_mib 1000 -> 1100 MiB (+10.0 %, limit 64 MiB)"),
        ("graph_breaks", 0.0, 3.0, "graph_breaks 0.000 -> 3.000 count (+3 count, limit 0.5 count)"),
        ("ppl_embedded_512", 10.0, 10.015, "ppl_embedded_512 10.00 -> 10.02 (+0.15 %, limit 0.10 %)"),
        ("kld_e_8tok", 0.0, 2e-5, "kld_e_8tok 0 -> 2e-05 nat (+2e-05 nat, limit 1e-06 nat)"),
        ("decode_tok_s", 100.0, 120.0, "decode_tok_s 100.0 -> 120.0 tok/s (+20.0 %, limit 2.0 %)"),
    ],
)
def test_message_of_other_metrics(name: str, baseline: float, now: float, end: str) -> None:
    assert message(CASE, "nvidia-h200", verdict(now, **{name: [baseline]})).endswith(end)


def test_one_run_within_the_limit_acquits() -> None:
    first = verdict(90.0, decode_tok_s=[100.0])
    assert suspicions([first]) == [first]
    (final,) = confirm([first], repeats("decode_tok_s", 99.0))
    assert final.status == "ok"
    assert (final.beyond, final.runs) == (1, 2)
    assert "1 of 2 runs, not confirmed" in message(CASE, "nvidia-h200", final)


def test_a_repeat_without_the_metric_does_not_acquit() -> None:
    (final,) = confirm(
        [verdict(90.0, decode_tok_s=[100.0])], [record({}, outcome="failed"), *repeats("decode_tok_s", 89.0)]
    )
    assert final.fails
    assert final.now == pytest.approx(89.5)


def test_without_repeats_a_suspicion_stays() -> None:
    first = [verdict(90.0, decode_tok_s=[100.0])]
    assert confirm(first, []) == first


@pytest.mark.parametrize("outcome", ["void", "skipped"])
def test_repeats_that_say_nothing_confirm_nothing(outcome: str) -> None:
    """Two disturbed or skipped repeats: one run alone never fails."""
    (final,) = confirm([verdict(90.0, decode_tok_s=[100.0])], [record({}, outcome=outcome)] * 2)
    assert not final.fails
    assert final.reason == f"not confirmed: of its repeats 2 were {outcome}"
    assert undecided([final]) == [final]


@pytest.mark.parametrize("outcome", ["void", "skipped"])
def test_a_repeat_that_says_nothing_neither_confirms_nor_keeps_the_other_from_acquitting(outcome: str) -> None:
    """A regression takes all three runs beyond the limit."""
    first, silent = verdict(90.0, decode_tok_s=[100.0]), record({"decode_tok_s": 50.0}, outcome=outcome)
    for order in ([silent, *repeats("decode_tok_s", 90.0)], [*repeats("decode_tok_s", 90.0), silent]):
        (final,) = confirm([first], order)
        assert not final.fails
        assert (final.beyond, final.runs, final.now) == (2, 2, 90.0)
        assert undecided([final]) == [final]
    (final,) = confirm([first], [silent, *repeats("decode_tok_s", 99.0)])
    assert final.status == "ok"
    assert undecided([final]) == []


def test_an_improvement_is_never_confirmed_or_failed() -> None:
    (final,) = confirm([verdict(150.0, decode_tok_s=[100.0])], repeats("decode_tok_s", 50.0) * REPEATS)
    assert final.status == "improvement"
    assert not final.fails


def test_limit_is_the_largest_of_the_three() -> None:
    decode, vram = metrics.METRICS["decode_tok_s"], metrics.METRICS["vram_peak_mib"]
    five = Values(200.0, (200.0,) * 5)
    assert limit_for(decode, five, NO_SPREAD, False) == pytest.approx(4.0)
    assert limit_for(decode, five, NO_SPREAD, True) == pytest.approx(20.0)
    k = spread_factor(80, 5)
    assert limit_for(decode, five, Spread(0.01, 80), False) == pytest.approx(k * 0.01 * 200)
    assert limit_for(vram, five, Spread(30.0, 80), False) == pytest.approx(k * 30)
    assert limit_for(vram, five, Spread(1.0, 80), False) == 64
    with pytest.raises(ValueError, match="no limit"):
        limit_for(metrics.METRICS["mbu"], five, NO_SPREAD, False)


def test_a_baseline_too_noisy_to_gate_is_pointed_out() -> None:
    rows = [row(f"case{i}", decode_tok_s=[99.8, 99.9, 100, 100.1, 100.2], compile_s=[1.0, 1.5]) for i in range(19)]
    assert find_blunt(rows, "cuda") == []
    freak = row("decode.py::test_decode[x]", decode_tok_s=[99.8, 100, 100.1, 100.2, 50.0], mbu=[0.1, 0.9])
    (blunt,) = find_blunt([*rows, freak], "cuda")
    assert (blunt.case, blunt.metric) == ("decode.py::test_decode[x]", "decode_tok_s")
    assert str(blunt).startswith("decode[x]: decode_tok_s limit 2")
    assert str(blunt).endswith("its runs gave 99.80, 100.0, 100.1, 100.2, 50.00 tok/s")
    assert find_blunt([*rows, freak], "cpu") == []


def test_blunt_limits_are_counted_by_metric() -> None:
    assert blunt_words([]) == ""
    one = Blunt("a", "compile_s", 3.0)
    assert blunt_words([one]) == "1 limit is too wide to guard much: compile_s of 1 case (up to 300 %)"
    told = blunt_words([one, Blunt("a", "ttft_ms", 0.31), Blunt("b", "compile_s", 0.4)])
    assert told.endswith("too wide to guard much: compile_s of 2 cases (up to 300 %), ttft_ms of 1 case (up to 31 %)")
    assert told.startswith("3 limits are ")


# The two figures of the gate


@pytest.mark.parametrize(
    ("cases", "runs", "noise"),
    [
        (20, 5, simulation.gaussian),
        (3, 5, simulation.gaussian),
        (1, 5, simulation.gaussian),
        (20, 2, simulation.gaussian),
        (20, 5, simulation.heavy_tailed),
        (20, 5, simulation.uneven),
    ],
)
def test_false_alarms_and_catches(cases: int, runs: int, noise: simulation.Noise) -> None:
    """0 false alarms of 600,000 bound the rate below 5e-6 (95 %); 13 would still bound it below 1 in 20,000."""
    result = simulation.simulate(cases, runs, 600_000 // cases, noise=noise, seed=1)
    assert result.verdicts >= 599_000
    assert result.false_alarms * result.verdicts <= 13
    assert result.false_alarms <= simulation.FALSE_ALARMS_ALLOWED
    assert result.caught >= simulation.CATCH_REQUIRED


def test_the_simulation_can_tell_a_bad_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "spread_factor", lambda freedom, runs: 1.5)
    assert simulation.simulate(20, 5, 5_000).false_alarms > 10 * simulation.FALSE_ALARMS_ALLOWED


@pytest.mark.parametrize(("cases", "floor"), [(1, 0.0), (3, 0.02), (8, 0.0)])
def test_the_simulation_decides_as_the_gate_does(cases: int, floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers through ``simulation.fails`` and through pool_spread, judge and confirm: the same failures."""
    made = metrics.Metric(
        "latency",
        "ms",
        "lower",
        metrics.Limit(relative=floor or 1e-12),
        ("decode",),
        ("cuda",),
        None,
        lambda m: None,
        "",
    )
    monkeypatch.setitem(metrics.METRICS, "latency", made)
    rng = np.random.default_rng(7)
    trials, runs = 150, 5
    baseline = 1 + 0.01 * rng.standard_normal((trials, cases, runs)) * np.array([1.0] * (cases - 1) + [4.0])[:, None]
    now = 1 + 0.01 * rng.standard_normal((trials, cases, 1 + REPEATS)) + 0.8 * rng.random((trials, cases, 1)) ** 2
    expected = simulation.fails(baseline, now, floor)
    failed = np.zeros_like(expected)
    for t in range(trials):
        rows = [row(str(c), latency=list(map(float, baseline[t, c]))) for c in range(cases)]
        spreads = pool_spread(rows)
        for c, each in enumerate(rows):
            first = judge(record({"latency": float(now[t, c, 0])}), each, spreads, "cuda")
            again = repeats("latency", *map(float, now[t, c, 1:]))
            failed[t, c] = confirm(first, again)[0].fails
    assert 0.02 < expected.mean() < 0.98  # the comparison means something
    assert (failed == expected).all()


def test_a_verdict_reads_back_from_its_short_form() -> None:
    verdict = Verdict("decode_tok_s", "regression", "tok/s", 268.7, 241.0, 5.4, beyond=3, runs=3)
    assert Verdict(**json.loads(json.dumps(verdict.to_dict()))) == verdict
    assert Verdict("mbu", "new").to_dict() == {"metric": "mbu", "status": "new"}
