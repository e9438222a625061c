"""--update-baselines: which runs it takes, which rows it writes, and when it refuses."""

from __future__ import annotations

import json
import sys

import pytest
from fakes import BF16_NODE, CASES, DECODE, NODE

from lowbit.pytest_plugin import updating

pytest_plugins = ["pytester"]


def test_update_takes_kept_runs_and_measures_nothing_more(bench):
    bench.run()
    kept = bench.runs()
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert result.ret == 0
    assert "nothing to measure: to be accepted from 1 kept run" in result.stdout.str()
    assert f"baseline written: {bench.baseline}" in result.stdout.str()
    assert bench.runs() == kept
    assert json.loads(bench.baseline.read_text())["lowbit"]["runs"] == 1


def test_a_controller_with_enough_kept_runs_measures_nothing_more(bench):
    bench.run("-k", "test_quality")
    kept = bench.runs()
    result = bench.run("-n", "1", "--update-baselines", "--baseline-runs", "1", "-k", "test_quality", processes=True)
    assert result.ret == 0
    assert "lowbit: 2 cases, nothing to measure: to be accepted from 1 kept run" in result.stdout.str()
    assert f"baseline written: {bench.baseline}" in result.stdout.str()
    assert bench.runs() == kept
    assert len(bench.rows()) == 2


def test_workers_are_gone_before_further_runs_are_measured(bench):
    with (bench.root / "conftest.py").open("a") as conftest:
        conftest.write(COUNT_PROCESSES)
    result = bench.run("-n", "1", "--update-baselines", "--baseline-runs", "2", "-k", "test_quality", processes=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*1 worker(s), on the CPU*", "ERROR: others of this session: set()"])
    assert len(bench.runs()) == 1


COUNT_PROCESSES = """
import os
from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children, updating

def count(bench, number):
    raise LowbitError(f"others of this session: {children.own_pids() - {os.getpid()}}")

updating._measure_once_more = count
"""


def test_update_measures_the_missing_runs_in_fresh_processes_and_says_little(bench):
    bench.run("-k", "test_decode")
    result = bench.run("--update-baselines", "--baseline-runs", "3", "-k", "test_decode", processes=True)
    assert result.ret == 0
    text = result.stdout.str()
    assert "lowbit: baseline run 3 of 3, in a fresh process" in text
    assert "baseline run 2 of 3" not in text
    assert text.count("recommendation") == text.count("benchmark 'decode b1_c0'") == 1
    assert f"baseline written: {bench.baseline}" in text
    assert len(bench.runs()) == 3
    assert {tuple(row["decode_tok_s"]) for row in bench.rows().values()} == {(100.0,) * 3}


def test_kept_runs_of_another_environment_are_not_taken(bench):
    bench.run()
    bench.plan(environment={"torch": "2.13.0", "lowbit_source": "edited"})
    bench.accept()
    assert len(bench.runs()) == 2
    header = json.loads(bench.baseline.read_text())["lowbit"]["header"]
    assert header["environment"]["lowbit_source"] == "edited"


def test_update_with_k_replaces_only_those_rows(bench):
    bench.accept()
    bench.plan(tok_s={"decode": 200}, environment={"torch": "2.14.0"})
    bench.accept("-k", f"test_decode[{DECODE}]")
    assert len(bench.rows()) == CASES
    assert bench.rows()[NODE]["decode_tok_s"] == [200]
    assert bench.rows()[BF16_NODE]["decode_tok_s"] == [100]


def test_a_first_baseline_with_k_has_only_those_rows(bench):
    bench.run()
    bench.accept("-k", f"test_decode[{DECODE}]")
    assert list(bench.rows()) == [NODE]


def test_rows_of_cases_that_are_gone_go_with_the_next_whole_baseline(bench):
    bench.accept()
    bench.plan(formats=["bf16-torch"])
    bench.accept()
    assert len(bench.rows()) == CASES / 2
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES / 2)


def test_a_smaller_suite_leaves_a_larger_ones_rows(bench):
    bench.accept("--suite", "nightly")
    rows = len(bench.rows())
    bench.plan(environment={"torch": "2.14.0"})
    bench.accept()
    assert len(bench.rows()) == rows > CASES


@pytest.mark.parametrize("fault", ["error", "bug"])
def test_a_failing_run_is_not_accepted(bench, fault):
    bench.plan(**{fault: f"decode[{DECODE}]"})
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert not bench.baseline.exists()
    assert "nothing was accepted" in result.stdout.str()


def test_ctrl_c_accepts_nothing_and_exits_with_2(bench):
    bench.plan(interrupt=f"decode[{DECODE}]")
    assert bench.run("--update-baselines", "--baseline-runs", "1").ret == pytest.ExitCode.INTERRUPTED
    assert not bench.baseline.exists()


def test_a_void_case_is_measured_in_a_further_run_and_then_named(bench):
    bench.plan(void=f"decode[{DECODE}]")
    turns = []

    def measure_once_more(session, number):
        turns.append(number)
        bench.run()

    bench.monkeypatch.setattr(updating, "_measure_once_more", measure_once_more)
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert turns == [1]
    assert f"nothing was accepted; decode[{DECODE}] void: thermal slowdown" in result.stdout.str()
    assert not bench.baseline.exists()


def test_noise_that_blinds_the_gate_is_named(bench):
    for speed in (100, 400):
        bench.plan(tok_s={f"decode[{DECODE}]": speed})
        bench.run("-k", f"test_decode[{DECODE}]")
    result = bench.run("--update-baselines", "--baseline-runs", "2", "-k", f"test_decode[{DECODE}]")
    assert f"too noisy to be gated well: decode[{DECODE}]: decode_tok_s limit " in result.stdout.str()
    assert "its runs gave" in result.stdout.str()
    assert "what helps: a quieter machine, more runs (--baseline-runs), or more cases" in result.stdout.str()
    judged = bench.run("--benchmark-compare", "-k", f"test_decode[{DECODE}]").stdout.str()
    assert "limit is too wide to guard much: decode_tok_s of 1 case (up to " in judged  # "ok" by that says little


def test_an_unwritable_baselines_folder_is_a_usage_error_and_the_run_is_kept(bench):
    (bench.root / "benches" / "baselines").write_text("a file in the folder's place")
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "can't write" in result.stdout.str()
    assert bench.journal()[-1]["complete"] is True


def test_the_baseline_is_readable_by_pytest_benchmark(bench):
    bench.accept()
    result = bench.pytester.run(sys.executable, "-m", "pytest_benchmark", "compare", str(bench.baseline))
    assert result.ret == 0
    assert DECODE in result.stdout.str()
