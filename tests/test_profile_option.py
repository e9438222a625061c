"""--profile and CUDA_LAUNCH_BLOCKING in a session: what they refuse, leave out and keep away from baselines."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from fakes import CASES, FAKE_GPU, Bench

from lowbit.device import environment, launch_blocking
from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children, gate

pytest_plugins = ["pytester"]


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    return Bench(pytester, monkeypatch)


@pytest.mark.parametrize("option", ["--benchmark-compare", "--update-baselines", "--resume"])
def test_a_profiled_run_is_never_judged_accepted_or_continued(bench, option):
    bench.accept()
    runs, rows = bench.runs(), bench.rows()
    result = bench.run("--profile", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"leave {option} out" in result.stderr.str()
    assert (bench.runs(), bench.rows()) == (runs, rows)


def test_a_profiled_run_is_not_kept_has_no_gate_and_leaves_quality_out(bench):
    bench.accept()
    runs = bench.runs()
    bench.plan(tok_s={"a16w4": 1})  # would be a regression
    result = bench.run("--profile", "--compare-if-baseline")
    result.assert_outcomes(passed=CASES - 2, deselected=2)
    text = result.stdout.str()
    assert "lowbit: --profile: nothing is kept, compared or accepted; files in " in text
    assert "profiled: nothing was kept or compared" in text
    assert "recommendation" not in text
    assert bench.runs() == runs
    assert [child for child in bench.children if "profile" in child] == []


def test_fresh_processes_and_workers_of_a_profiled_run_share_its_folder(bench):
    seen = []

    def refuse(config, nodeid):
        seen.append(children.child_args(config))
        raise LowbitError("seen")

    bench.monkeypatch.setattr(children, "run_case", refuse)
    bench.run("--profile", "--isolate", "-k", "decode and eager")
    assert len(seen) == 2
    folders = {word for words in seen for word in words if word.startswith("--lowbit-profile=")}
    assert all("--profile" in words for words in seen)
    (folder,) = folders
    assert str(bench.root / ".lowbit" / "profiles") in folder


@pytest.mark.parametrize("option", ["--benchmark-compare", "--update-baselines"])
def test_launch_blocking_refuses_to_gate(bench, option):
    bench.accept()
    bench.monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    result = bench.run(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"{option}: CUDA_LAUNCH_BLOCKING=1: the host waits" in result.stderr.str()


def test_launch_blocking_voids_what_is_timed(bench):
    bench.accept()
    bench.monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    result = bench.run("--compare-if-baseline", "-rs")
    result.assert_outcomes(passed=2, skipped=CASES - 2)
    assert "void: CUDA_LAUNCH_BLOCKING=1" in result.stdout.str()
    outcomes = {line["record"]["kind"]: line["record"]["outcome"] for line in bench.journal() if line["type"] == "case"}
    assert outcomes == {"quality": "measured", "prefill": "void", "decode": "void"}
    assert bench.children == []  # measuring again would change nothing
    bench.monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    bench.run("--benchmark-compare").assert_outcomes(passed=CASES)


@pytest.mark.parametrize("device", [FAKE_GPU, replace(FAKE_GPU, kind="cpu", slug="cpu-x")], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("value", "blocks"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_launch_blocking_is_part_of_the_environment(monkeypatch, value, blocks, device):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
    assert launch_blocking() is blocks
    assert ("CUDA_LAUNCH_BLOCKING" in environment(device)) is blocks


def test_launch_blocking_refuses_to_gate_on_a_cpu_too(monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    bench = SimpleNamespace(blocking=launch_blocking(), settings=SimpleNamespace(compare=True, update_baselines=False))
    with pytest.raises(LowbitError, match=r"--benchmark-compare: CUDA_LAUNCH_BLOCKING=1"):
        gate.refuse_blocking(bench)
