"""The gate in a run: a regression fails its test, JUnit says so, and nothing passes in silence."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from fakes import CASES, DECODE, NODE, SLOW

from lowbit import baselines, runs
from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children
from lowbit.pytest_plugin.keys import SESSION
from lowbit.report import content, markdown
from lowbit.report.page import data

pytest_plugins = ["pytester"]

BF16 = ["bf16-torch"]


def test_an_unchanged_run_passes_and_says_what_it_was_compared_with(bench):
    bench.accept()
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES)
    assert f"lowbit: comparing with {bench.baseline} (1 runs)" in result.stdout.str()
    assert "since the baseline" not in result.stdout.str()
    assert f"test_decode[{DECODE}] (0001)" in result.stdout.str()  # pytest-benchmark's table beside it
    assert bench.children == []


def test_a_slowdown_fails_that_test_by_name_and_junit_says_so(bench):
    bench.accept()
    bench.plan(tok_s=SLOW)
    result = bench.run("--benchmark-compare", "--junitxml=junit.xml")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    message = f"decode[{DECODE}] on fake-gpu: decode_tok_s 100.0 -> 90.0 tok/s (-10.0 %, limit 2.0 %, 3 of 3 runs)"
    assert message in result.stdout.str()
    assert "REGRESSED" in result.stdout.str()
    assert bench.children == [NODE, NODE]
    failures = list(ElementTree.parse(bench.root / "junit.xml").iter("failure"))
    assert [message in failure.attrib["message"] for failure in failures] == [True]
    judged = [line for line in bench.journal() if line["type"] == "judged" and line["case"] == NODE]
    assert judged[-1]["by"].startswith("0001_embedded-auto.json of ")
    (kept,) = [verdict for verdict in judged[-1]["verdicts"] if verdict["status"] == "regression"]
    assert (kept["metric"], kept["now"], kept["beyond"], kept["runs"]) == ("decode_tok_s", 90.0, 3, 3)


def test_a_slowdown_that_a_fresh_process_does_not_confirm_passes(bench):
    bench.accept()
    bench.plan(tok_s=SLOW)
    bench.recover()
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES)
    assert len(bench.children) == 1


def test_the_device_is_free_for_the_process_that_confirms(bench):
    bench.accept()
    bench.plan(tok_s=SLOW)
    held = []

    def watch(config, nodeid):
        held.append(config.stash[SESSION].lab.holding)
        return bench.run_case(config, nodeid)

    bench.monkeypatch.setattr(children, "run_case", watch)
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES - 1, failed=1)
    assert held == [False, False]


def test_a_confirming_process_that_dies_fails_the_test_and_spoils_the_run(bench):
    bench.accept()
    bench.plan(tok_s=SLOW)

    def die(config, nodeid):
        raise LowbitError("its fresh process was killed by SIGKILL")

    bench.monkeypatch.setattr(children, "run_case", die)
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert f"decode[{DECODE}] on fake-gpu: its fresh process was killed by SIGKILL" in result.stdout.str()
    assert bench.journal()[-1]["regressed"] is True


class Repeats:
    """What the fresh processes of a suspicious case measure, in order: tok/s, or None where the card was disturbed."""

    def __init__(self, bench, *tok_s):
        self.left = list(tok_s)
        self.run_case = bench.run_case
        bench.accept()
        bench.plan(tok_s=SLOW)
        bench.monkeypatch.setattr(children, "run_case", self)

    def __call__(self, config, nodeid):
        record, stats = self.run_case(config, nodeid)
        now = self.left.pop(0)
        if now is None:
            record.outcome, record.error = "void", "another process worked on the card: pid 2146"
        else:
            record.metrics["decode_tok_s"] = now
        return record, stats


def test_a_disturbed_confirmation_is_measured_once_more(bench):
    repeats = Repeats(bench, None, 90.0, None, 90.0)
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert "(-10.0 %, limit 2.0 %, 3 of 3 runs)" in result.stdout.str()
    assert repeats.left == []


def test_a_disturbed_confirmation_keeps_the_next_from_failing_not_from_acquitting(bench):
    repeats = Repeats(bench, None, None, 100.0)
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES)
    assert repeats.left == []


@pytest.mark.parametrize("tok_s", [(None,) * 4, (90.0, None, None), (None, None, 90.0)])
def test_a_suspicion_that_a_busy_card_keeps_from_being_confirmed_is_void(bench, tok_s):
    """Neither a regression nor good: no verdict of it is kept, and the summary says what to do."""
    Repeats(bench, *tok_s)
    result = bench.run("--benchmark-compare", "-rs", "--benchmark-json=all.json")
    result.assert_outcomes(passed=CASES - 1, skipped=1)
    told = " ".join(result.stdout.str().split())
    reason = "decode_tok_s beyond the limit, which could not be confirmed: another process worked on the card: pid 2146"
    assert f"void: decode[{DECODE}]: {reason}" in told
    assert (
        "1 case void: neither good nor worse, no figure of theirs is judged or accepted; measure again when the card "
        f'is free: the same command, with -k "test_decode[{DECODE}]"' in told
    )
    kept = runs.read(runs.list_runs(bench.root / ".lowbit/runs")[-1])
    record = kept.entries[NODE].record
    assert (record.outcome, record.error) == ("void", reason)
    assert "judged" not in record.info
    assert (kept.regressed, NODE in kept.cases()) == (False, False)
    stored = json.loads((bench.root / "all.json").read_text())["benchmarks"]
    assert [one["extra_info"]["lowbit"]["outcome"] for one in stored if DECODE in one["name"]].count("void") == 1
    headline = markdown.headline(content.of_run(kept, baselines.load(bench.baseline)))
    assert headline.startswith("⚠️ nothing got worse in what could be judged; 1 case void")


def test_a_run_whose_every_case_is_void_is_not_green(bench):
    bench.accept()
    bench.plan(void="")
    result = bench.run("--benchmark-compare", "-k", "decode")
    result.assert_outcomes(skipped=CASES - 6, deselected=6)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = " ".join(result.stdout.str().split())
    assert "ERROR: nothing was judged by 0001_embedded-auto.json: 4 cases void, none measured; measure again" in told
    kept = content.of_run(runs.read(bench.runs()[-1]), baselines.load(bench.baseline))
    assert markdown.headline(kept).startswith("⚠️ nothing could be judged; 4 cases void: ")
    assert bench.run("-k", "decode").ret == pytest.ExitCode.OK  # nothing was to be judged


def test_a_regressed_run_never_becomes_a_baseline_by_itself(bench):
    bench.accept()
    before = bench.baseline.read_text()
    bench.plan(tok_s=SLOW)
    assert bench.run("--benchmark-compare").ret == 1
    assert bench.journal()[-1]["regressed"] is True
    assert bench.run("--benchmark-compare", "--benchmark-autosave").ret == 1  # pytest-benchmark's ratchet
    assert bench.run("--benchmark-compare").ret == 1
    assert bench.baseline.read_text() == before


def test_an_improvement_passes_and_is_reported_with_the_command_that_accepts_it(bench):
    bench.accept()
    bench.plan(tok_s={f"decode[{DECODE}]": 120})
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES)
    text = result.stdout.str().replace("\n  ", " ")
    assert f"unexplained improvement: decode[{DECODE}]: decode_tok_s 100.0 -> 120.0 tok/s (+20.0 %)" in text
    assert f'accept it: pytest benches --update-baselines -k "test_decode[{DECODE}]"' in text


def test_what_was_upgraded_stands_beside_the_regression(bench):
    bench.accept()
    bench.plan(tok_s=SLOW, environment={"torch": "2.14.0", "triton": "3.8"})
    result = bench.run("--benchmark-compare", "--junitxml=junit.xml")
    upgrades = "since the baseline: torch 2.13.0 -> 2.14.0, triton none -> 3.8"
    assert result.stdout.str().count(upgrades) == 3  # header, the failed test, the summary
    (failure,) = ElementTree.parse(bench.root / "junit.xml").iter("failure")
    assert upgrades in failure.text


# -- baselines that are missing, broken, foreign -----------------------------------------------------------------------


def test_no_baseline_is_a_usage_error_before_anything_is_measured(bench):
    result = bench.run("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "make one with: pytest benches --update-baselines" in result.stderr.str()
    assert bench.runs() == []


def test_compare_if_baseline_runs_without_one_and_compares_with_one(bench):
    result = bench.run("--compare-if-baseline")
    assert result.ret == 0
    assert "no baseline of this device and model; accept this run with: pytest benches" in result.stdout.str()
    bench.accept()
    bench.plan(tok_s=SLOW)
    result = bench.run("--compare-if-baseline")
    assert f"comparing with {bench.baseline}" in result.stdout.str()
    assert result.ret == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "empty file"),
        ("{", "broken JSON"),
        ('{"benchmarks": []}', "without lowbit's part"),
        ('{"machine_info": {}, "benchmarks": [], "version": "5"}', "without lowbit's part"),
        ('{"benchmarks": [], "lowbit": {"schema": 99}}', "upgrade lowbit to read it"),
    ],
)
@pytest.mark.parametrize("option", ["--benchmark-compare", "--compare-if-baseline", "--update-baselines"])
def test_a_broken_baseline_is_refused(bench, content, text, option):
    bench.baseline.parent.mkdir(parents=True)
    bench.baseline.write_text(content)
    result = bench.run(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert bench.baseline.name in result.stderr.str()
    assert text in result.stderr.str()
    assert "upgrade lowbit" in text or "delete it and make it anew (a baseline: pytest benches" in result.stderr.str()
    assert bench.baseline.read_text() == content
    assert bench.runs() == []


def test_a_baseline_of_another_device_is_refused_and_of_other_versions_is_not(bench):
    bench.accept()
    bench.plan(environment={"torch": "9.9"})
    assert bench.run("--benchmark-compare").ret == 0
    kept = bench.runs()
    foreign = json.loads(bench.baseline.read_text())
    foreign["lowbit"]["header"]["device"] = "other-gpu"
    bench.baseline.write_text(json.dumps(foreign))
    result = bench.run("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "foreign to this run (device: expected fake-gpu, got other-gpu)" in result.stderr.str()
    assert bench.runs() == kept


def test_compare_with_a_named_baseline(bench):
    bench.accept()
    assert bench.run("--benchmark-compare=0001").ret == 0
    assert bench.run(f"--benchmark-compare={bench.baseline}").ret == 0
    result = bench.run("--benchmark-compare=0007")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "it has: 0001_embedded-auto.json" in result.stderr.str()


# -- cases that come and go --------------------------------------------------------------------------------------------


def test_a_new_case_fails_with_advice(bench):
    bench.plan(formats=BF16)
    bench.accept()
    bench.plan()
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=5, failed=5)
    advice = f'accept it with: pytest benches --update-baselines -k "test_decode[{DECODE}]"'
    assert f"decode[{DECODE}] on fake-gpu: not in the baseline 0001_embedded-auto.json; {advice}" in result.stdout.str()
    told = "lowbit: 5 of them not in the baseline (suite quick): those that run here fail as new, until accepted with: "
    assert f"{told}pytest benches --update-baselines" in result.stdout.str()
    assert told not in bench.run("--benchmark-compare", "-k", "bf16").stdout.str()


def test_compare_if_baseline_measures_a_new_case_and_judges_the_others(bench):
    bench.plan(formats=BF16)
    bench.accept()
    bench.plan()
    result = bench.run("--compare-if-baseline")
    result.assert_outcomes(passed=10)
    told = "lowbit: 5 of them not in the baseline (suite quick): those that run here are measured and not judged"
    assert told in result.stdout.str()
    result.stdout.re_match_lines([r"a16w4_g128-torchao .* new$", r"bf16-torch .* ok$"])
    kept = content.of_run(runs.read(bench.runs()[-1]), baselines.load(bench.baseline))
    assert markdown.headline(kept).startswith("✅ nothing got worse")
    cases = data.collect(kept)["cases"]
    assert dict(zip(cases["id"], cases["state"], strict=True))[NODE] == "measured"
    assert set(cases["state"]) == {"ok", "measured"}
    bench.plan(tok_s={"decode[bf16-torch-eager-b1_c0]": 80})
    bench.run("--compare-if-baseline").assert_outcomes(passed=9, failed=1)
    assert bench.run("--compare-if-baseline", "--benchmark-compare").ret == 1


def test_a_vanished_case_is_a_failure_of_its_own(bench):
    bench.accept()
    bench.plan(formats=BF16)
    result = bench.run("--benchmark-compare", "--junitxml=junit.xml")
    result.assert_outcomes(passed=5, failed=5)
    assert f"{NODE} on fake-gpu: in the baseline 0001_embedded-auto.json, no longer collected" in result.stdout.str()
    assert len(list(ElementTree.parse(bench.root / "junit.xml").iter("failure"))) == 5
    again = bench.run("--benchmark-compare", "--lf")
    again.assert_outcomes(failed=5)


def test_a_deleted_bench_file_vanishes_with_all_its_cases(bench):
    bench.accept()
    (bench.root / "benches" / "test_decode.py").unlink()
    bench.run("--benchmark-compare").assert_outcomes(passed=6, failed=4)


def test_what_the_command_leaves_out_did_not_vanish(bench):
    bench.accept()
    bench.run("--benchmark-compare", "-k", "bf16 and decode").assert_outcomes(passed=2, deselected=8)
    bench.run("--benchmark-compare", paths=("benches/test_decode.py",)).assert_outcomes(passed=4)
    bench.run("--benchmark-compare", paths=(NODE,)).assert_outcomes(passed=1)
    bench.run("--benchmark-compare", "--ignore=benches/test_decode.py").assert_outcomes(passed=6)
    bench.run("--benchmark-compare", f"--deselect={NODE}").assert_outcomes(passed=9, deselected=1)
    bench.plan(error="decode[bf16-torch-eager")
    assert bench.run("--benchmark-compare").ret == 1
    bench.plan()
    bench.run("--benchmark-compare", "--lf").assert_outcomes(passed=1)


def test_k_leaves_out_vanished_cases_too(bench):
    bench.accept()
    bench.plan(formats=BF16)
    bench.run("--benchmark-compare", "-k", "bf16").assert_outcomes(passed=5, deselected=5)
    bench.run("--benchmark-compare", "-k", "decode").assert_outcomes(passed=2, failed=2, deselected=6)


def test_a_larger_suites_cases_did_not_vanish_from_a_smaller_one(bench):
    bench.accept("--suite", "nightly")
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES)


def test_a_case_that_stops_running_fails(bench):
    bench.accept()
    bench.plan(skip=["a16w4_g128-torchao"])
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=5, failed=5)
    assert "measured in the baseline, skipped now (capability: needs SM100, this is SM90)" in result.stdout.str()


def test_a_skip_of_the_baseline_stays_a_skip(bench):
    bench.plan(skip=["a16w4_g128-torchao"])
    bench.accept()
    bench.run("--benchmark-compare").assert_outcomes(passed=5, skipped=5)


# -- with workers, in processes of their own ---------------------------------------------------------------------------


def test_workers_gate_their_cases_report_what_vanished_and_take_up_an_interrupted_run(bench):
    bench.plan(formats=["bf16-torch", "a16w4_g128-torchao", "a16w8-torchao"])
    bench.accept()
    bench.plan(interrupt="decode[bf16-torch-reduce")
    bench.run()
    before = bench.journal()
    bench.plan(tok_s={**SLOW, "decode[bf16-torch-eager": 1})  # the latter would show if it was measured again
    bench.monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "2")
    result = bench.run("-n", "2", "--resume", "--benchmark-compare", processes=True)
    result.assert_outcomes(passed=CASES - 1, failed=6)
    text = result.stdout.str()
    assert "decode_tok_s 100.0 -> 90.0 tok/s (-10.0 %, limit 2.0 %, 3 of 3 runs)" in text
    assert text.count("no longer collected") == 5
    assert "lowbit: 10 cases, less than a minute" in text
    assert "REGRESSED" in text
    assert bench.journal()[: len(before)] == before
    assert [line["type"] for line in bench.journal()].count("case") == CASES
    end = bench.journal()[-1]
    assert (end["complete"], end["regressed"]) == (True, True)
