"""Fresh processes: what they are told, what comes back, that nothing of them is left; foreign results shown as own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytest_benchmark.stats import Metadata
from toy_benches import GUARD_S, Toy, gone

from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children
from lowbit.pytest_plugin.foreign import ForeignBenchmark
from lowbit.record import Record

pytest_plugins = ["pytester"]

NODE = "benches/test_decode.py::test_decode[bf16-torch-eager-b1_c0]"


@pytest.fixture
def toy(pytester, monkeypatch):
    return Toy(pytester, monkeypatch)


@pytest.fixture
def configure(toy):
    """A config as a session with these arguments would have it."""

    def configure(*args):
        return toy.pytester.parseconfig(*args)

    return configure


# -- a result of another process ---------------------------------------------------------------------------------------


@pytest.fixture
def timed():
    """What pytest-benchmark keeps of a test with five rounds."""
    names = {
        "name": "test_it[a]",
        "fullname": "t.py::test_it[a]",
        "group": "g",
        "param": "a",
        "params": {"format": "a"},
    }
    fixture = SimpleNamespace(**names, extra_info={"lowbit": {"x": 1.0}}, cprofile_stats=None, has_error=False)
    metadata = Metadata(fixture, iterations=2, options={"min_rounds": 5, "disable_gc": True})
    for duration in (0.5, 0.25, 0.3, 0.26, 0.28):
        metadata.update(duration)
    return metadata


def test_a_foreign_result_has_the_face_of_metadata(timed):
    foreign = ForeignBenchmark.from_stats(json.loads(json.dumps(timed.as_dict(include_data=True))))
    assert bool(foreign) is bool(timed) is True
    assert foreign.has_error is timed.has_error is False
    for flags in ({}, {"include_data": False}, {"flat": True}, {"stats": False}, {"flat": True, "include_data": False}):
        assert foreign.as_dict(**flags) == timed.as_dict(**flags)
    columns = (
        "min",
        "max",
        "mean",
        "stddev",
        "rounds",
        "median",
        "iqr",
        "q1",
        "q3",
        "outliers",
        "ops",
        "iterations",
        "total",
    )
    for column in (*columns, "name", "fullname", "group", "param"):
        assert foreign[column] == timed[column]
        assert foreign.get(column) == timed.get(column)
    assert foreign.get("nonsense", 3) == 3
    with pytest.raises(AttributeError):
        foreign["nonsense"]
    assert foreign.stats.data == timed.stats.data


def test_a_foreign_result_without_timings_is_false():
    assert not ForeignBenchmark({}, fullname="a::b", name="b")


@pytest.mark.parametrize("stats", [{}, {"fullname": "a"}, {"stats": None}])
def test_a_dict_of_another_form_is_refused(stats):
    with pytest.raises(LowbitError, match="not a pytest-benchmark result"):
        ForeignBenchmark.from_stats(stats)


def test_isolated_results_fill_pytest_benchmarks_table_files_and_comparison(toy):
    args = ("benches", "-k", "bf16", "--isolate")
    toy.run(*args, "--benchmark-json=out.json", "--benchmark-save=first").assert_outcomes(passed=2)
    rows = toy.json()["benchmarks"]
    assert sorted(row["fullname"] for row in rows) == [NODE.replace("eager", "compiled"), NODE]
    assert all(row["group"] == "decode" and row["params"]["mode"] and len(row["stats"]["data"]) == 3 for row in rows)
    assert rows[0]["extra_info"] == {"lowbit": {"decode_tok_s": 100.0}}
    # A hundred times as fast a past is a regression to pytest-benchmark too.
    saved = next(toy.path.glob(".benchmarks/*/*.json"))
    past = json.loads(saved.read_text())
    for row in past["benchmarks"]:
        row["stats"]["mean"] /= 100
    saved.write_text(json.dumps(past))
    again = toy.run(
        *(*args, "--benchmark-compare", "--benchmark-compare-fail=mean:50%", "--benchmark-save=second"),
        *("--benchmark-sort=fullname", "--benchmark-group-by=param:mode,func", "--benchmark-columns=min,ops,rounds"),
    )
    again.stdout.fnmatch_lines(["*benchmark 'mode=compiled test_decode': 2 tests*", "*(0001_first)*", "*(NOW)*"])
    assert again.ret != 0
    assert "Field 'mean' has failed PercentageRegressionCheck" in again.stdout.str() + again.stderr.str()
    both = sorted(map(str, toy.path.glob(".benchmarks/*/*.json")))
    compared = toy.pytester.run(sys.executable, "-m", "pytest_benchmark", "compare", *both, timeout=GUARD_S)
    assert compared.ret == 0
    compared.stdout.fnmatch_lines(["*4 tests*"])


# -- what a child is told ----------------------------------------------------------------------------------------------


def test_child_args_repeat_what_is_measured_and_nothing_else(toy, configure, monkeypatch):
    (toy.path / "folder").mkdir()
    monkeypatch.setenv("PYTEST_ADDOPTS", "--model folder -W ignore::UserWarning")
    toy.pytester.makeini("[pytest]\naddopts = --junitxml=never.xml -k bf16\n")
    config = configure(
        *(
            "benches",
            "--text=text.txt",
            "--recipe=mine.json",
            "--lowbit-device=1",
            "-n",
            "2",
            "--lf",
            "--benchmark-save=never",
            "-x",
        ),
        *("-o", "console_output_style=count", "-m", "not slow", "-p", "no:doctest"),
    )
    path = toy.path
    assert children.child_args(config) == [
        *(f"--rootdir={path}", "-c", str(path / "tox.ini"), "-o", "addopts=", "-o", "console_output_style=count"),
        *("-p", "no:doctest", "-W", "ignore::UserWarning"),
        *(f"--model={path / 'folder'}", f"--text={path / 'text.txt'}"),
        *(f"--recipe={path / 'mine.json'}", "--lowbit-device=1"),
    ]
    assert children.session_args(config)[len(children.child_args(config)) :] == [
        *("-n", "2", "-k", "bf16", "-m", "not slow", str(path / "benches"))
    ]


def test_session_args_keep_node_ids_and_deselections(toy, configure):
    config = configure(NODE, f"--deselect={NODE}", "--ignore=benches/old", "--isolate", "--model=embedded")
    own = children.session_args(config)[len(children.child_args(config)) :]
    assert own == ["--isolate", f"--deselect={NODE}", f"--ignore={toy.path}/benches/old", f"{toy.path}/{NODE}"]
    assert "--model=embedded" in children.child_args(config)


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_child_returns_its_record_and_its_stats(configure, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2 --junitxml=junit.xml")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    config = configure("benches", "--model=embedded")
    record, stats = children.run_case(config, NODE, environment={"TOY_VARIABLE": "set"}, timeout_s=GUARD_S)
    assert (record.case, record.model, record.metrics) == (NODE, "embedded", {"decode_tok_s": 100.0})
    assert (record.info["device"], record.info["worker"], record.info["variable"]) == ("1", None, "set")
    assert record.info["pid"] != record.info["parent"] == os.getpid()
    # This process plays a worker, so the session is its parent's: all three processes are the child's own.
    assert {os.getppid(), os.getpid(), record.info["pid"]} <= set(record.info["own_pids"])
    assert len(stats["stats"]["data"]) == 3
    assert not Path("junit.xml").exists()


def test_a_child_whose_test_fails_returns_its_record_all_the_same(toy, configure):
    toy.plan(**{"bf16-torch-eager": "fail"})
    record, stats = children.run_case(configure("benches"), NODE, timeout_s=GUARD_S)
    assert record.error == "decode_tok_s 200 -> 100 tok/s"
    assert stats is not None


@pytest.mark.parametrize(
    ("act", "nodeid", "message"),
    [
        (
            "die",
            NODE,
            r"its fresh process ended with exit code 9 and left no result; its last lines:\n(.*\n)*.*dying of a test",
        ),
        (
            "unmeasured",
            NODE,
            r"ended with exit code 1 and left no result; its last lines:\n(.*\n)*.*before it was measured",
        ),
        (
            "fail",
            NODE.replace("bf16-torch-eager", "nonsense"),
            r"ended with exit code 4 and left no result(.*\n)*.*not found",
        ),
    ],
)
def test_a_child_without_a_result_is_an_error_with_its_last_lines(toy, configure, act, nodeid, message):
    toy.plan(**{"bf16-torch-eager": act})
    with pytest.raises(LowbitError, match=message):
        children.run_case(configure("benches"), nodeid, timeout_s=GUARD_S)


def read_pid(path, within_s=GUARD_S):
    deadline = time.monotonic() + within_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return int(path.read_text())


def test_a_child_that_takes_too_long_is_stopped(toy, configure, monkeypatch):
    monkeypatch.setattr(children, "GRACE_S", 0.5)
    toy.plan(**{"bf16-torch-eager": "hang"})

    class Popen(subprocess.Popen):
        """The 2 s begin when the test is reached: a busy machine takes longer to start Python."""

        def wait(self, timeout=None):
            if timeout == 2:
                read_pid(toy.path / "hanging")
            return super().wait(timeout)

    monkeypatch.setattr(children.subprocess, "Popen", Popen)
    with pytest.raises(LowbitError, match=r"did not end within 2 s and was stopped; "):
        children.run_case(configure("benches"), NODE, timeout_s=2)
    assert gone(read_pid(toy.path / "hanging"))


@pytest.mark.parametrize("fatal", [signal.SIGINT, signal.SIGKILL])
def test_a_child_ends_with_its_parent(toy, fatal, tmp_path):
    """Ctrl-C and a killed parent: the case of a dead session does not hold its device."""
    toy.plan(**{"bf16-torch-eager": "hang"})
    command = [sys.executable, "-m", "pytest", NODE, "--isolate", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=toy.path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        try:
            child = read_pid(toy.path / "hanging")
            parent.send_signal(fatal)
            output, _ = parent.communicate(timeout=GUARD_S)
        finally:
            parent.kill()
    assert gone(child), output
    if fatal == signal.SIGINT:
        assert parent.returncode == pytest.ExitCode.INTERRUPTED
        assert not list(tmp_path.glob("lowbit-child-*"))


def record(case=NODE):
    return Record(case, "decode", "bf16-torch", "eager", "b1_c0", "embedded", "auto")


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    children.write_result(path, {}, {})
    assert not path.exists()
    children.write_result(path, {NODE: record()}, {NODE: None})
    assert children._read_result(path, NODE, tmp_path / "none") == (record(), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(LowbitError, match="measures one case, got 2"):
        children.write_result(path, {"a": record("a"), "b": record("b")}, {})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"record": null, "stats": null}', '{"record": {"schema": 99}}'])
def test_a_garbled_result_is_an_error(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(LowbitError):
        children._read_result(path, NODE, tmp_path / "none")


def test_a_result_of_another_case_is_an_error(tmp_path):
    path = tmp_path / "result.json"
    children.write_result(path, {"other": record("other")}, {})
    with pytest.raises(LowbitError, match="measured another case, other; it printed nothing"):
        children._read_result(path, NODE, tmp_path / "none")


def test_own_pids_are_this_process_and_its_descendants(monkeypatch):
    monkeypatch.delenv("LOWBIT_ROOT_PID", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '30']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        grandchild = int(process.stdout.readline())
        try:
            pids = children.own_pids()
            assert {os.getpid(), process.pid, grandchild} <= pids
            assert os.getppid() not in pids
            monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
            assert os.getppid() in children.own_pids()
        finally:
            os.kill(grandchild, signal.SIGKILL)
