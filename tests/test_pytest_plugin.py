"""A bench run as a user sees it: what it prints, selects, refuses and writes. tests/fakes.py stands in for hardware."""

from __future__ import annotations

import dataclasses
import inspect
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import fakes
import pytest
from fakes import CASES, DECODE, FAKE_CHOICE, FakeLab

from lowbit.errors import LowbitError
from lowbit.lab import Lab
from lowbit.models import Choice
from lowbit.pytest_plugin import session, summary

pytest_plugins = ["pytester"]


def collected(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line]


# -- the plain run -----------------------------------------------------------------------------------------------------


def test_a_run_prints_the_table_and_the_answer_and_is_kept(bench):
    bench.plan(tok_s={"a16w4_g128-torchao-reduce-overhead": 250})
    result = bench.run()
    result.assert_outcomes(passed=CASES)
    text = result.stdout.str()
    assert "lowbit: Fake GPU (fake-gpu), model embedded, load format auto: a fake" in text
    assert "lowbit: 10 cases, about 4 min (a guess until a run is kept)" in text
    assert (
        "recommendation (KL ≤ 0.05 and VRAM ≤ 100,000 MiB): a16w4_g128-torchao · reduce-overhead: 250.0 tok/s" in text
    )
    assert f'reproduce: pytest benches -k "test_decode[{DECODE}]"' in text
    assert "accept this machine's figures with: pytest benches --update-baselines" in text
    assert "warning" not in text.lower()
    answer = text.partition("= lowbit =")[2].partition("run kept in")[0]
    assert max(map(len, answer.splitlines())) <= 100
    (run,) = bench.runs()
    assert f"run kept in {run}" in text
    assert len(json.loads((run / "run.json").read_text())["benchmarks"]) == CASES
    assert not (bench.root / "benches" / "baselines").exists()
    assert "lowbit: 10 cases, less than a minute (by the last kept runs)" in bench.run().stdout.str()


def test_the_kept_run_says_what_made_it(bench):
    bench.run("-k", "decode", "-m", "benchmark")
    header = bench.journal()[0]
    assert header["environment"] == {"torch": "2.13.0"}
    assert header["selection"] == {"-k": "decode", "-m": "benchmark"}
    assert header["commit"] == session.source_commit()


def test_a_skip_has_its_reason(bench):
    bench.plan(skip=["a16w4_g128-torchao"])
    result = bench.run("-rs")
    result.assert_outcomes(passed=5, skipped=5)
    assert "capability: needs SM100, this is SM90" in result.stdout.str()
    assert "skipped, capability: needs SM100, this is SM90: 5 cases of a16w4_g128-torchao" in result.stdout.str()
    assert "warning" not in result.stdout.str().lower()


def test_the_limits_of_the_recommendation_are_the_users(bench):
    assert "no measured case has KL ≤ 0.05 and VRAM ≤ 500 MiB" in bench.run("--max-vram", "500").stdout.str()
    text = bench.run("--max-kld", "0.001").stdout.str()
    assert "recommendation (KL ≤ 0.001 and VRAM ≤ 100,000 MiB): bf16-torch" in text


def test_reproducing_and_accepting_commands_carry_the_measuring_options(bench):
    (bench.root / "my text.txt").write_text("a text")
    args = ("--model", "embedded", "--suite", "nightly", "--text", "my text.txt", "--baselines-dir", "kept here")
    bench.plan(tok_s={"a16w4_g128-torchao-reduce-overhead": 250})
    text = bench.run(*args, "-k", "int4").stdout.str()
    options = "pytest benches --model embedded --suite nightly --text 'my text.txt'"
    assert f'reproduce: {options} -k "test_decode[{DECODE}]"' in text
    assert f"{options} --update-baselines --baselines-dir 'kept here'" in text


# -- collecting and selecting ------------------------------------------------------------------------------------------


def test_collect_only_says_how_many_cases_and_minutes(bench):
    result = bench.run("--collect-only")
    assert result.ret == 0
    assert "lowbit: 10 cases, about 4 min (a guess until a run is kept)" in result.stdout.str()
    assert bench.runs() == []


def test_the_reproducing_command_selects_exactly_one_case(bench):
    result = bench.run("--collect-only", "-q", "-k", f"test_decode[{DECODE}]")
    assert collected(result) == [f"benches/test_decode.py::test_decode[{DECODE}]"]


def test_keywords_of_the_field_select_cases(bench):
    for words, expected in (
        ("int4 and decode", 2),
        ("W4A16 and decode and eager", 1),
        ("torchao", 5),
        ("quality", 2),
        ("compiled and not prefill", 2),
    ):
        assert len(collected(bench.run("--collect-only", "-q", "-k", words))) == expected, words


def test_one_format_is_alive_at_a_time(bench):
    names = collected(bench.run("--collect-only", "-q"))
    assert ["a16w4" in name for name in names] == [False] * 5 + [True] * 5
    assert "test_quality" in names[0]


def test_nightly_has_more_modes_and_workloads(bench):
    names = collected(bench.run("--collect-only", "-q", "--suite", "nightly"))
    assert len(names) == 2 * (1 + 6 * 5)


def test_k_that_matches_nothing_says_what_there_is(bench):
    text = " ".join(bench.run("-k", "int5 and decode").stdout.str().split())
    assert "lowbit: no case of suite quick matches -k 'int5 and decode'. Its formats: bf16-torch, a16w4_g128" in text
    assert "quality, eager, compiled" in text
    assert "--suite" not in text
    text = " ".join(bench.run("-k", "max-autotune and decode").stdout.str().split())
    assert "matches -k 'max-autotune and decode'; --suite nightly has max-autotune-no-cudagraphs, max-autotune." in text
    assert "; --suite nightly has batch8." in " ".join(bench.run("-k", "batch8").stdout.str().split())
    bench.plan(formats=["bf16-torch", "a16w4_g128-torchao", "a16w5_intx_g32-torchao"])
    text = " ".join(bench.run("-k", "int5 and torchao").stdout.str().split())
    assert "matches -k 'int5 and torchao'; --suite full has a16w5_intx_g32-torchao. Its formats: bf16-torch" in text
    bench.plan()
    bench.monkeypatch.setattr(summary, "MOST_FORMATS", 1)
    text = " ".join(bench.run("-k", "int5").stdout.str().split())
    assert "Its formats: 2, listed by python -m lowbit formats; other words: int4" in text
    assert "no case of suite" not in bench.run("-m", "not benchmark").stdout.str()


def test_k_that_matches_nothing_is_pytests_own_exit_and_keeps_nothing(bench):
    assert bench.run("-k", "int3").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert bench.run("-k", "int3", "--update-baselines").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert bench.runs() == []
    assert not bench.baseline.exists()


def test_one_file_alone(bench):
    bench.run(paths=("benches/test_decode.py",)).assert_outcomes(passed=4)
    bench.run(paths=(f"benches/test_decode.py::test_decode[{DECODE}]",)).assert_outcomes(passed=1)


def test_from_another_directory(bench, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    bench.monkeypatch.chdir(elsewhere)
    path = (str(bench.root / "benches"),)
    assert bench.run("--update-baselines", "--baseline-runs", "1", paths=path).ret == 0
    assert bench.baseline.exists()
    assert len(bench.runs()) == 1
    bench.run("--benchmark-compare", paths=path).assert_outcomes(passed=CASES)
    assert [path.name for path in elsewhere.iterdir()] == [".benchmarks"]  # pytest-benchmark's own


def test_tests_alone_ask_for_no_device(bench):
    (bench.root / "tests").mkdir()
    (bench.root / "tests" / "test_it.py").write_text("def test_it():\n    pass\n")
    bench.monkeypatch.setattr(session, "BenchSession", None)
    result = bench.run(paths=("tests",))
    result.assert_outcomes(passed=1)
    assert "lowbit" not in result.stdout.str().replace(str(bench.root), "")


def test_lf_and_x_behave_as_in_pytest(bench):
    bench.plan(error="decode[bf16-torch-reduce")
    first = bench.run()
    first.assert_outcomes(passed=CASES - 1, failed=1)
    again = bench.run("--lf")
    again.assert_outcomes(failed=1)
    stopped = bench.run("-x", "-p", "no:cacheprovider")
    stopped.assert_outcomes(passed=4, failed=1)
    assert stopped.ret == 1
    assert bench.journal()[-1]["complete"] is False


def test_m_selects_by_mark(bench):
    bench.run("-m", "benchmark").assert_outcomes(passed=CASES)
    assert bench.run("-m", "not benchmark").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_junit_has_every_case_and_no_noise(bench):
    bench.plan(error=f"decode[{DECODE}]")
    bench.run("--junitxml=junit.xml")
    (suite,) = ElementTree.parse(bench.root / "junit.xml").iter("testsuite")
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == (str(CASES), "1", "0")
    tests = list(suite.iter("testcase"))
    assert f"test_decode[{DECODE}]" in {test.attrib["name"] for test in tests}
    assert [[child.tag for child in test] for test in tests if list(test)] == [["failure"]]


def test_pytest_benchmarks_own_json_carries_the_records_and_the_device(bench):
    bench.run("--benchmark-json=out.json")
    document = json.loads((bench.root / "out.json").read_text())
    assert document["machine_info"] == {"device": "Fake GPU", "slug": "fake-gpu", "torch": "2.13.0"}
    decoded = {
        row["name"]: row["extra_info"]["lowbit"]["metrics"].get("decode_tok_s") for row in document["benchmarks"]
    }
    assert len(decoded) == CASES
    assert decoded[f"test_decode[{DECODE}]"] == 100


# -- options -----------------------------------------------------------------------------------------------------------

OPTIONS = (
    *("--model", "--load-format", "--suite", "--baselines-dir", "--update-baselines", "--baseline-runs"),
    *("--isolate", "--resume", "--max-kld", "--max-vram", "--text", "--compare-if-baseline"),
)


def test_help_lists_the_options_in_a_group(bench):
    group = bench.run("--help").stdout.str().partition("lowbit: low-bit Llama benchmarks")[2].partition("\n\n")[0]
    assert [option for option in OPTIONS if f"  {option}" not in group] == []
    assert "--lowbit-child" not in group  # between lowbit's own processes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--suite", "huge"], "unknown suite 'huge'; known: quick, nightly, full"),
        (["--baseline-runs", "0"], "--baseline-runs: expected at least 1"),
        (["--text", "absent.txt"], "no such file: absent.txt"),
        (["--load-format", "gguf"], "invalid choice: 'gguf'"),
        (["--update-baselines", "--benchmark-compare"], "give one of them"),
        (["--benchmark-compare-fail", "mean:5%"], "--benchmark-compare-fail: nothing to compare with"),
        (["-n", "2"], "benches need a GPU for each worker"),
        (["--benchmark-compare=/absent.json"], "--benchmark-compare=/absent.json: no such file"),
        (["-k", "int4 and"], "Wrong expression passed to '-k'"),
    ],
)
def test_bad_options_are_usage_errors(bench, arguments, text):
    result = bench.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert text in result.stderr.str()
    assert bench.runs() == []


def test_a_folder_behind_benchmark_compare_is_not_taken_for_a_baseline(bench):
    result = bench.run(paths=("--benchmark-compare", "benches"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "write: pytest benches --benchmark-compare" in result.stderr.str()


@pytest.mark.parametrize("given", [["--benchmark-compare"], ["-x", "--update-baselines"], ["--report", "r.html"]])
def test_without_a_path_an_option_of_benches_does_not_run_the_tests(bench, given):
    (bench.root / "tests").mkdir()
    (bench.root / "tests" / "test_own.py").write_text("def test_own(): pass\n")
    (bench.root / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    result = bench.run(*given, paths=())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"without a path tests/ would run: pytest benches {' '.join(given)}" in result.stderr.str()
    bench.run(paths=()).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--model", "gpt-2", "unknown model 'gpt-2'; known: "),
        ("--model", "./nowhere", "nowhere"),
        ("--model", "benches", "config.json"),
        ("--lowbit-device", "7", "unknown device 7; known: 0"),
    ],
)
def test_an_unknown_model_or_device_is_a_usage_error_that_lists_the_known(bench, option, value, text):
    bench.monkeypatch.setattr(fakes, "install", lambda set_attribute: None)
    result = bench.run(option, value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert text in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_a_device_that_can_not_be_used_is_a_usage_error(bench):
    def refuse(*args, **options):
        raise LowbitError("no such luck")

    bench.monkeypatch.setattr(FakeLab, "__init__", refuse)
    result = bench.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no such luck" in result.stderr.str()


def test_measure_case_elsewhere_says_what_it_is_for(bench):
    (bench.root / "benches" / "test_other.py").write_text("def test_other(measure_case):\n    measure_case()\n")
    result = bench.run("-k", "test_other")
    result.assert_outcomes(failed=1, deselected=CASES)
    assert "measure_case is for the functions test_quality, test_eval, test_prefill, test_decode" in result.stdout.str()


@pytest.mark.parametrize("name", ["unmet", "release", "close", "measure"])
def test_the_fake_lab_has_the_labs_face(name):
    """Else these tests would pass while users' sessions fail."""
    assert parameters(getattr(FakeLab, name)) == parameters(getattr(Lab, name))


def test_the_other_fakes_have_the_faces_of_what_they_stand_for():
    assert parameters(FakeLab.__init__) == parameters(Lab.__init__)
    assert vars(FAKE_CHOICE).keys() <= {"parameters", *(field.name for field in dataclasses.fields(Choice))}


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)
