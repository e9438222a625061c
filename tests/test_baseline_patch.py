"""--baseline-patch: a diff that git applies, that accepts exactly what it names, and that the gate takes."""

from __future__ import annotations

import json
import subprocess

import pytest
from fakes import BF16_NODE, DECODE, NODE, SLOW, Bench

from lowbit import baseline_patch

pytest_plugins = ["pytester"]


class Repository(Bench):
    """The fake project in a git repository, its baseline committed."""

    def git(self, *args: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *args]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout

    def commit(self) -> str:
        """The committed baseline's text."""
        if not (self.root / ".git").exists():
            self.git("init", "-q")
        self.git("add", "benches")
        self.git("commit", "-q", "-m", "baseline")
        return self.baseline.read_text()

    @property
    def patch(self):
        return self.root / "accept.patch"

    def compare(self, *args: str, **kwargs):
        return self.run("--benchmark-compare", f"--baseline-patch={self.patch}", *args, **kwargs)

    def apply(self) -> set[str]:
        """git apply it; the cases whose lines changed."""
        self.git("apply", "--check", str(self.patch))
        self.git("apply", str(self.patch))
        assert self.git("status", "--porcelain", "benches").split() == ["M", "benches/baselines/fake-gpu/" + NAME]
        changed = [line for line in self.git("diff", "-U0", "benches").splitlines() if '"fullname":' in line]
        return {json.loads(line[1:].strip().rstrip(","))["fullname"] for line in changed}


NAME = "0001_embedded-auto.json"


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Repository:
    return Repository(pytester, monkeypatch)


def test_a_slowdown_is_accepted_and_nothing_else(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s=SLOW)
    result = bench.compare()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert f"baseline patch: {bench.patch} accepts 1 case; apply it with: git apply" in result.stdout.str()
    text = bench.patch.read_text()
    assert f"decode[{DECODE}] on fake-gpu: decode_tok_s 100.0 -> 90.0 tok/s (-10.0 %" in text
    assert bench.apply() == {NODE}
    assert bench.rows()[NODE]["decode_tok_s"] == [90.0, 90.0, 90.0]  # the run and its repeats
    assert bench.rows()[BF16_NODE]["decode_tok_s"] == [100.0]


def test_the_patched_baseline_passes_the_gate_and_still_fails_a_further_slowdown(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s=SLOW)
    bench.compare()
    bench.apply()
    again = bench.compare()
    assert again.ret == 0
    assert "no baseline patch: nothing to accept" in again.stdout.str()
    assert not bench.patch.exists()  # that of the run before is not left to be applied by mistake
    bench.plan(tok_s={f"decode[{DECODE}]": 80})
    assert bench.run("--benchmark-compare").ret == pytest.ExitCode.TESTS_FAILED


def test_an_improvement_is_accepted_too_and_what_is_not_confirmed_is_not(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s={f"decode[{DECODE}]": 120})
    assert bench.compare().ret == 0
    assert bench.apply() == {NODE}
    assert bench.rows()[NODE]["decode_tok_s"] == [120.0]


def test_a_slowdown_that_is_not_confirmed_is_not_in_the_patch(bench):
    bench.accept()
    bench.plan(tok_s=SLOW)
    bench.recover()
    assert bench.compare().ret == 0
    assert not bench.patch.exists()


def test_a_new_case_is_accepted(bench):
    bench.plan(formats=["bf16-torch"])
    bench.accept()
    bench.commit()
    bench.plan()
    assert bench.compare("-k", f"bf16 or test_decode[{DECODE}]").ret == pytest.ExitCode.TESTS_FAILED
    assert bench.apply() == {NODE}
    assert bench.run("--benchmark-compare", "-k", f"bf16 or test_decode[{DECODE}]").ret == 0


def test_a_case_that_is_skipped_now_and_one_that_is_gone_are_accepted(bench):
    bench.accept()
    bench.commit()
    bench.plan(skip=["a16w4_g128-torchao"])
    assert bench.compare().ret == pytest.ExitCode.TESTS_FAILED
    assert all("a16w4_g128-torchao" in case for case in bench.apply())
    assert bench.run("--benchmark-compare").ret == 0
    bench.commit()
    bench.plan(formats=["bf16-torch"])  # the skips of the format are gone as well
    assert bench.compare().ret == pytest.ExitCode.TESTS_FAILED
    assert "a16w4_g128-torchao" in bench.patch.read_text()
    assert bench.apply() == set()
    assert bench.run("--benchmark-compare").ret == 0


def test_a_failed_case_has_no_figures_to_accept(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s=SLOW, error="decode[bf16-torch-eager")
    bench.compare()
    assert "not accepted, failed: decode[bf16-torch-eager-b1_c0]" in bench.patch.read_text()
    assert bench.apply() == {NODE}


def test_what_was_upgraded_is_said_and_recorded(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s=SLOW, environment={"torch": "2.14.0"})
    bench.compare()
    assert "since the baseline: torch 2.13.0 -> 2.14.0" in bench.patch.read_text()
    bench.apply()
    part = json.loads(bench.baseline.read_text())["lowbit"]
    assert part["header"]["environment"] == {"torch": "2.14.0"}
    assert part["environments"] == [{"torch": "2.13.0"}, {"torch": "2.14.0"}]


def test_workers_results_are_patched_by_the_controller(bench):
    bench.accept()
    bench.commit()
    bench.monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "2")
    bench.plan(tok_s=SLOW)
    result = bench.compare("-n", "2", processes=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert bench.apply() == {NODE}
    assert len(bench.rows()[NODE]["decode_tok_s"]) == 3


def test_it_needs_a_comparison(bench):
    result = bench.run(f"--baseline-patch={bench.patch}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "give --benchmark-compare too" in result.stderr.str()
    bench.run("--compare-if-baseline", f"--baseline-patch={bench.patch}").stdout.fnmatch_lines(
        ["*no baseline patch: no baseline to patch*"]
    )


def test_a_patch_that_cannot_be_written_is_an_error_after_the_run(bench):
    bench.accept()
    bench.commit()
    bench.plan(tok_s={f"decode[{DECODE}]": 120})
    bench.patch.mkdir()
    result = bench.compare()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "can't write" in result.stdout.str()
    assert bench.journal()[-1]["complete"] is True


@pytest.mark.parametrize("name", ["plain.json", "with a blank.json"])
@pytest.mark.parametrize(("old", "new"), [("a\nb", "a\nc\n"), ("a\nb\n", "a\nc"), ("a\n", "a\nb\nc\n"), ("a", "b")])
def test_git_takes_every_unified_diff(tmp_path, name, old, new):
    path = tmp_path / "deep" / name
    path.parent.mkdir()
    path.write_text(old)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    text = baseline_patch.preface(["what a person", "--- a/reads\n+++ above"]) + baseline_patch.unified(path, old, new)
    (tmp_path / "x.patch").write_text(text)
    subprocess.run(["git", "apply", "x.patch"], cwd=tmp_path, check=True)
    assert path.read_text() == new
