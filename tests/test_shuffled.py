""".ci/shuffled.py: benches in the random order of a seed, one format after the other, in one process and in workers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from fakes import CASES
from toy_benches import FORMATS, Toy

pytest_plugins = ["pytester"]
CI = Path(__file__).parents[1] / ".ci"


@pytest.fixture
def seeded(monkeypatch):
    """A function that asks for the order of a seed."""
    monkeypatch.syspath_prepend(CI)

    def ask(seed):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CI), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("PYTEST_ADDOPTS", "-p shuffled")
        monkeypatch.setenv("LOWBIT_ORDER_SEED", seed)

    return ask


def formats_of(order):
    """The formats in the order in which they ran: one that was left and taken up again stands there twice."""
    return [name for name, _ in itertools.groupby(case.partition("[")[2].partition("-")[0] for case in order)]


def test_two_seeds_are_two_orders_and_their_runs_become_one_baseline(bench, seeded):
    orders = []
    for seed in ("1", "2", "1"):
        seeded(seed)
        result = bench.run()
        result.assert_outcomes(passed=CASES)
        assert f"shuffled: the order of LOWBIT_ORDER_SEED={seed}" in result.stdout.str()
        orders.append([line["record"]["case"] for line in bench.journal() if line["type"] == "case"])
        assert sorted(formats_of(orders[-1])) == ["a16w4_g128", "bf16"]  # each built once
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    kept = bench.runs()
    bench.accept("--baseline-runs", "3")
    assert bench.runs() == kept
    assert {len(values) for row in bench.rows().values() for values in row.values()} == {3}


def test_workers_get_the_formats_in_that_order(pytester, monkeypatch, seeded):
    toy = Toy(pytester, monkeypatch)
    monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "1")
    orders = {}
    for seed in ("3", "4"):
        seeded(seed)
        done = len(toy.kept())
        toy.run("benches", "-n", "1").assert_outcomes(passed=2 * len(FORMATS))
        orders[seed] = [record["case"] for record in toy.kept()[done:]]
    assert all(len(formats_of(order)) == len(FORMATS) for order in orders.values())  # none left and taken up again
    assert orders["3"] != orders["4"]


@pytest.mark.parametrize("seed", ["", "-1", "a"])
def test_a_seed_that_is_none_is_refused(bench, seeded, seed):
    seeded(seed)
    result = bench.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"LOWBIT_ORDER_SEED: expected a whole number of 0 or more, got '{seed}'" in result.stderr.str()
