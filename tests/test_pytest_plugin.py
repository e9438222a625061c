"""The plugin under pytest itself (``pytester``): gate, traps of pytest-benchmark, kept runs, baselines, exit codes.

Fakes (tests/fakes.py) stand in for the device, the model and the lab; everything else is what users run. The sessions
run in this process, so fresh processes (confirmation, --isolate) are replaced by FakeLab too, and counted.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from fakes import FAKE_CHOICE, FAKE_GPU, FakeLab

from lowbit import cases, texts
from lowbit.formats import FORMATS
from lowbit.pytest_plugin import children, session

pytest_plugins = ["pytester"]

BENCHES = Path(__file__).parents[1] / "benches"
DECODE = "a16w4_g128-torchao-reduce-overhead-b1_c0"


class Bench:
    """A project folder with the real benches, on fake hardware."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester, self.monkeypatch = pytester, monkeypatch
        self.root = pytester.path
        self.children: list[str] = []
        (self.root / "benches").mkdir()
        for name in ("test_decode.py", "test_prefill.py", "test_quality.py"):
            shutil.copy(BENCHES / name, self.root / "benches" / name)
        (self.root / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
        monkeypatch.setattr(session, "Lab", FakeLab)
        monkeypatch.setattr(session, "detect", lambda index: FAKE_GPU)
        monkeypatch.setattr(session, "environment", lambda device: dict(self.environment))
        monkeypatch.setattr(session.models, "choose", lambda *args: FAKE_CHOICE)
        monkeypatch.setattr(session.texts, "choose_source", lambda *args: texts.Source("embedded", 512, None))
        monkeypatch.setattr(children, "run_case", self.run_case)
        self.environment = {"torch": "2.13.0"}
        self.formats("bf16-torch", "a16w4_g128-torchao")

    def formats(self, *ids: str) -> None:
        rows = {row: FORMATS[row] for row in ids}
        self.monkeypatch.setattr(cases, "FORMATS", rows)

    def run_case(self, config, nodeid):
        """A fresh process's result: FakeLab again, without another pytest."""
        self.children.append(nodeid)
        name = nodeid.rpartition("::test_")[2]
        kind, _, rest = name.partition("[")
        case = next(c for c in cases.enumerate_cases(kind, "quick", 1) if c.id == rest.removesuffix("]"))
        self.monkeypatch.setenv("LOWBIT_FAKE_CHILD", "1")
        record = FakeLab(FAKE_GPU, FAKE_CHOICE).measure(case, nodeid, lambda target, rounds: target())
        self.monkeypatch.delenv("LOWBIT_FAKE_CHILD")
        return record, None

    def plan(self, **plan) -> None:
        (self.root / "speeds.json").write_text(json.dumps(plan))

    def run(self, *args: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(
            "benches", "-p", "lowbit.pytest_plugin", "-p", "no:cacheprovider", *args
        )

    def accept(self, *args: str) -> pytest.RunResult:
        result = self.run("--update-baselines", "--baseline-runs", "1", *args)
        assert result.ret == 0, result.outlines
        return result

    @property
    def baseline(self) -> Path:
        return self.root / "benches" / "baselines" / "fake-gpu" / "0001_embedded-auto.json"

    def runs(self) -> list[Path]:
        return sorted((self.root / ".lowbit" / "runs").glob("*"))


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(pytester, monkeypatch)


CASES = 2 * (1 + 2 + 2)  # formats × (quality + 2 modes × (prefill, decode))


# -- the plain run -----------------------------------------------------------------------------------------------------


def test_a_run_prints_the_table_and_the_answer_and_is_kept(bench):
    bench.plan(**{"a16w4_g128-torchao-reduce-overhead": 250})
    result = bench.run()
    result.assert_outcomes(passed=CASES)
    text = result.stdout.str()
    assert "lowbit: 10 cases, about" in text
    assert "recommendation (KL ≤ 0.05" in text
    assert f'reproduce: pytest benches -k "test_decode[{DECODE}]"' in text
    (run,) = bench.runs()
    assert len(json.loads((run / "run.json").read_text())["benchmarks"]) == CASES
    assert not (bench.root / "benches" / "baselines").exists()


def test_the_reproducing_command_selects_exactly_one_case(bench):
    result = bench.run("--collect-only", "-q", "-k", f"test_decode[{DECODE}]")
    assert [line for line in result.outlines if "::" in line] == [f"benches/test_decode.py::test_decode[{DECODE}]"]


def test_keywords_of_the_field_select_cases(bench):
    for words, expected in (("int4 and decode", 2), ("W4A16 and decode and eager", 1), ("torchao", 5), ("quality", 2)):
        result = bench.run("--collect-only", "-q", "-k", words)
        assert sum("::" in line for line in result.outlines) == expected, words


def test_help_lists_the_options_in_a_group(bench):
    result = bench.run("--help")
    text = result.stdout.str()
    assert "lowbit: low-bit Llama benchmarks" in text
    for option in ("--model", "--load-format", "--suite", "--baselines-dir", "--update-baselines", "--baseline-runs",
                   "--isolate", "--resume", "--max-kld", "--max-vram"):
        assert option in text


def test_a_skip_has_its_reason(bench):
    bench.plan(skip=["a16w4_g128-torchao"])
    result = bench.run("-rs")
    result.assert_outcomes(passed=5, skipped=5)
    assert "capability: needs SM100, this is SM90" in result.stdout.str()


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_an_unchanged_run_passes(bench):
    bench.accept()
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES)
    assert bench.children == []


def test_a_slowdown_fails_that_test_by_name_and_junit_says_so(bench):
    bench.accept()
    bench.plan(**{f"decode[{DECODE}]": 90})
    result = bench.run("--benchmark-compare", "--junitxml=junit.xml")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert result.ret == 1
    message = f"decode[{DECODE}] on fake-gpu: decode_tok_s 100.0 -> 90.0 tok/s (-10.0 %, limit 2.0 %, 3 of 3 runs)"
    assert message in result.stdout.str()
    assert len(bench.children) == 2
    failures = ElementTree.parse(bench.root / "junit.xml").iter("failure")
    assert [message in failure.attrib["message"] for failure in failures] == [True]


def test_a_slowdown_that_a_fresh_process_does_not_confirm_passes(bench):
    bench.accept()
    bench.plan(**{f"decode[{DECODE}]": 90})
    once = bench.run_case

    def recovered(config, nodeid):
        bench.plan()
        return once(config, nodeid)

    bench.monkeypatch.setattr(children, "run_case", recovered)
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES)
    assert len(bench.children) == 1


def test_a_regressed_run_never_becomes_a_baseline_by_itself(bench):
    bench.accept()
    before = bench.baseline.read_text()
    bench.plan(**{f"decode[{DECODE}]": 90})
    assert bench.run("--benchmark-compare").ret == 1
    assert bench.run("--benchmark-compare", "--benchmark-autosave").ret == 1  # pytest-benchmark's ratchet
    assert bench.run("--benchmark-compare").ret == 1
    assert bench.baseline.read_text() == before


def test_an_improvement_passes_and_is_reported_with_the_command_that_accepts_it(bench):
    bench.accept()
    bench.plan(**{f"decode[{DECODE}]": 120})
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES)
    assert "unexplained improvement" in result.stdout.str()
    assert "--update-baselines -k" in result.stdout.str()


def test_no_baseline_is_a_usage_error_before_anything_is_measured(bench):
    result = bench.run("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "pytest benches --update-baselines" in result.stderr.str()
    assert bench.runs() == []


def test_compare_if_baseline_runs_without_one_and_compares_with_one(bench):
    result = bench.run("--compare-if-baseline")
    assert result.ret == 0
    assert "no baseline of this device and model" in result.stdout.str()
    bench.accept()
    bench.plan(**{f"decode[{DECODE}]": 90})
    assert bench.run("--compare-if-baseline").ret == 1


def test_a_new_case_fails_with_advice(bench):
    bench.formats("bf16-torch")
    bench.accept()
    bench.formats("bf16-torch", "a16w4_g128-torchao")
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=5, failed=5)
    assert "not in the baseline 0001_embedded-auto.json; accept it with: pytest benches" in result.stdout.str()


def test_a_vanished_case_is_a_failure_of_its_own(bench):
    bench.accept()
    bench.formats("bf16-torch")
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=5, failed=5)
    assert "no longer collected" in result.stdout.str()


def test_a_case_left_out_by_k_did_not_vanish(bench):
    bench.accept()
    bench.run("--benchmark-compare", "-k", "bf16 and decode").assert_outcomes(passed=2, deselected=8)


def test_a_case_that_stops_running_fails(bench):
    bench.accept()
    bench.plan(skip=["a16w4_g128-torchao"])
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=5, failed=5)
    assert "measured in the baseline, skipped now (capability: needs SM100, this is SM90)" in result.stdout.str()


@pytest.mark.parametrize("content", ["", "{", '{"benchmarks": []}', '{"machine_info": {}, "benchmarks": [], "version": "5"}'])
def test_a_broken_or_foreign_baseline_is_refused(bench, content):
    bench.baseline.parent.mkdir(parents=True)
    bench.baseline.write_text(content)
    result = bench.run("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert bench.baseline.name in result.stderr.str()
    assert bench.runs() == []


def test_a_baseline_of_another_device_is_refused_and_of_other_versions_is_not(bench):
    bench.accept()
    bench.environment = {"torch": "9.9"}
    assert bench.run("--benchmark-compare").ret == 0
    foreign = json.loads(bench.baseline.read_text())
    foreign["lowbit"]["header"]["device"] = "other-gpu"
    bench.baseline.write_text(json.dumps(foreign))
    result = bench.run("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "foreign to this run (device: expected fake-gpu, got other-gpu)" in result.stderr.str()


def test_compare_with_a_named_baseline(bench):
    bench.accept()
    assert bench.run("--benchmark-compare=0001").ret == 0
    result = bench.run("--benchmark-compare=0007")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "it has: 0001_embedded-auto.json" in result.stderr.str()


def test_xdist_never_disables_the_gate_in_silence(bench):
    result = bench.run("-n", "2", "--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_error_fails_its_own_case_only(bench):
    bench.plan(error=f"decode[{DECODE}]")
    result = bench.run()
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert f"decode[{DECODE}] on fake-gpu: NaN logits from a16w4_g128-torchao" in result.stdout.str()


def test_after_a_cuda_fault_the_rest_runs_in_fresh_processes(bench):
    bench.plan(cuda_fault="prefill[bf16-torch-eager")
    result = bench.run()
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert len(bench.children) == CASES - 2  # all but the quality case before it and the faulting one


def test_isolate_measures_every_case_in_a_fresh_process(bench):
    bench.run("--isolate").assert_outcomes(passed=CASES)
    assert len(bench.children) == CASES


def test_a_disturbed_case_is_repeated_then_void_and_never_regresses(bench):
    bench.accept()
    bench.plan(void=f"decode[{DECODE}]", **{f"decode[{DECODE}]": 50})
    result = bench.run("--benchmark-compare")
    result.assert_outcomes(passed=CASES - 1, skipped=1)
    assert len(bench.children) == 1


def test_ctrl_c_keeps_what_is_finished_and_resume_continues(bench):
    bench.plan(interrupt="decode[bf16-torch-eager")
    result = bench.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    (run,) = bench.runs()
    assert len((run / "journal.jsonl").read_text().splitlines()) == 1 + 2 + 1  # header, two cases, end
    bench.plan()
    result = bench.run("--resume")
    result.assert_outcomes(passed=CASES)
    assert bench.runs() == [run]
    assert len(json.loads((run / "run.json").read_text())["benchmarks"]) == CASES


def test_resume_without_an_interrupted_run_says_so(bench):
    result = bench.run("--resume")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no interrupted run" in result.stdout.str() + result.stderr.str()


# -- accepting ---------------------------------------------------------------------------------------------------------


def test_update_takes_kept_runs_and_measures_only_the_missing(bench):
    bench.run()
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert len(bench.runs()) == 1  # nothing was measured again
    assert "baseline written" in result.stdout.str()
    assert json.loads(bench.baseline.read_text())["lowbit"]["runs"] == 1


def test_update_with_k_replaces_only_those_rows(bench):
    bench.accept()
    bench.plan(**{"decode": 200})
    bench.environment = {"torch": "2.14.0"}
    bench.accept("-k", f"test_decode[{DECODE}]")
    rows = {row["fullname"]: row["extra_info"]["lowbit"]["metrics"] for row in json.loads(bench.baseline.read_text())["benchmarks"]}
    assert rows[f"benches/test_decode.py::test_decode[{DECODE}]"]["decode_tok_s"]["median"] == 200
    assert rows["benches/test_decode.py::test_decode[bf16-torch-eager-b1_c0]"]["decode_tok_s"]["median"] == 100


def test_a_failing_run_is_not_accepted(bench):
    bench.plan(error=f"decode[{DECODE}]")
    result = bench.run("--update-baselines", "--baseline-runs", "1")
    assert result.ret != 0
    assert not bench.baseline.exists()
    assert "nothing was accepted" in result.stdout.str()


def test_update_and_compare_exclude_each_other(bench):
    assert bench.run("--update-baselines", "--benchmark-compare").ret == pytest.ExitCode.USAGE_ERROR


def test_the_baseline_is_readable_by_pytest_benchmark(bench):
    bench.accept()
    result = bench.pytester.run("pytest-benchmark", "compare", str(bench.baseline))
    assert result.ret == 0
    assert DECODE in result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--suite", "huge"], "unknown suite 'huge'; known: quick, nightly, full"),
        (["--baseline-runs", "0"], "--baseline-runs: expected at least 1"),
        (["--text", "absent.txt"], "no such file: absent.txt"),
    ],
)
def test_bad_options_are_usage_errors(bench, arguments, text):
    result = bench.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert text in result.stderr.str()
