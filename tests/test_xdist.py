"""Workers: a device each, timing and gate in force, one merged result, and crashes that cost one test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from types import SimpleNamespace

import pytest
from toy_benches import FORMATS, GUARD_S, Toy, gone

from lowbit.pytest_plugin.scheduler import FormatScheduling, scope_of

pytest_plugins = ["pytester"]

CASES = 2 * len(FORMATS)


@pytest.fixture
def toy(pytester, monkeypatch):
    return Toy(pytester, monkeypatch)


# -- the scheduler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodeid", "scope"),
    [
        ("benches/test_decode.py::test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]", "a16w4_g128-torchao"),
        ("benches/test_quality.py::test_quality[a16w8-gemlite]", "a16w8-gemlite"),
        ("benches/test_quality.py::test_quality[a16w8_fp8-torchao]", "a16w8_fp8-torchao"),
        ("vanished:benches/test_decode.py::test_decode[bf16-torch-eager-b1_c0]", "bf16-torch"),
        ("benches/test_kernels.py::test_matvec[4096-eager]", "benches/test_kernels.py"),
        ("benches/test_kernels.py::test_matvec", "benches/test_kernels.py"),
    ],
)
def test_scope_is_the_format(nodeid, scope):
    assert scope_of(nodeid) == scope


def test_the_longest_format_id_wins():
    assert scope_of("t.py::t[a8w8-torch-x-eager]", ["a8w8-torch", "a8w8-torch-x"]) == "a8w8-torch-x"


class FakeNode:
    def __init__(self, name):
        self.gateway = SimpleNamespace(id=name)
        self.sent, self.shutting_down = [], False

    def send_runtest_some(self, indices):
        self.sent += indices

    def shutdown(self):
        self.shutting_down = True


def make_scheduler(nodes, tests):
    option = SimpleNamespace(loadscopereorder=False)
    config = SimpleNamespace(getvalue=lambda name: ["popen"] * len(nodes), option=option, hook=None)
    scheduler = FormatScheduling(config, SimpleNamespace(loadscopesched=lambda *words: None))
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    return scheduler


def names(*formats, cases=3):
    return [f"benches/test_decode.py::test_decode[{name}-eager-b{case}]" for name in formats for case in range(cases)]


def test_a_format_stays_in_one_worker():
    nodes, tests = [FakeNode("gw0"), FakeNode("gw1")], names(*FORMATS)
    make_scheduler(nodes, tests)
    assert nodes[0].sent == [0, 1, 2]
    assert nodes[1].sent == [3, 4, 5]
    assert not nodes[0].shutting_down


def test_the_next_format_comes_when_one_test_is_left():
    nodes, tests = [FakeNode("gw0"), FakeNode("gw1")], names(*FORMATS)
    scheduler = make_scheduler(nodes, tests)
    scheduler.mark_test_complete(nodes[0], 0)
    assert nodes[0].sent == [0, 1, 2]
    scheduler.mark_test_complete(nodes[0], 1)
    assert nodes[0].sent == [0, 1, 2, 6, 7, 8]


def test_formats_of_one_test_do_not_leave_a_worker_waiting():
    node = FakeNode("gw0")
    make_scheduler([node], names(*FORMATS, cases=1))
    assert node.sent == [0, 1]


def test_a_crashed_test_is_done_and_the_rest_goes_to_the_replacement():
    nodes, tests = [FakeNode("gw0"), FakeNode("gw1")], names("bf16-torch", "a16w8-torchao")
    scheduler = make_scheduler(nodes, tests)
    scheduler.mark_test_complete(nodes[0], 0)
    assert scheduler.remove_node(nodes[0]) == tests[1]
    replacement = FakeNode("gw2")
    scheduler.add_node(replacement)
    scheduler.add_node_collection(replacement, tests)
    scheduler.schedule()
    assert replacement.sent == [2]
    assert replacement.shutting_down


def test_finished_formats_of_a_crashed_worker_are_not_handed_out_again():
    nodes = [FakeNode("gw0")]
    scheduler = make_scheduler(nodes, names("bf16-torch", "a16w8-torchao"))
    for index in range(4):
        scheduler.mark_test_complete(nodes[0], index)
    assert scheduler.remove_node(nodes[0]) == names("a16w8-torchao")[1]
    assert scheduler.workqueue == OrderedDict(
        {"a16w8-torchao": dict(zip(names("a16w8-torchao"), (True, True, False), strict=True))}
    )


def test_a_worker_that_ends_in_order_leaves_nothing_behind():
    nodes = [FakeNode("gw0")]
    scheduler = make_scheduler(nodes, names("bf16-torch"))
    for index in range(3):
        scheduler.mark_test_complete(nodes[0], index)
    assert scheduler.remove_node(nodes[0]) is None
    assert scheduler.tests_finished
    with pytest.raises(KeyError):
        scheduler.remove_node(nodes[0])


# -- what is refused, before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "args", "reason"),
    [
        ("2", ["-n", "3"], "*-n 3: benches need a GPU for each worker, this machine has 2;*give -n 2, or -n auto*"),
        ("0", ["-n", "2"], "*-n 2: benches need a GPU for each worker, this machine has no GPU*"),
        ("2", ["-n", "2", "--dist", "each"], "*--dist each: a bench is measured once*"),
        ("2", ["--dist", "load", "--tx", "ssh=far"], "*workers of this machine (popen), got ssh=far*"),
        ("2", ["-n", "2", "--lowbit-device", "1"], "*--lowbit-device with -n*CUDA_VISIBLE_DEVICES*"),
    ],
)
def test_workers_without_a_device_of_their_own_are_refused(toy, monkeypatch, devices, args, reason):
    monkeypatch.setenv("LOWBIT_FAKE_DEVICES", devices)
    result = toy.run("benches", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([reason])
    assert toy.lines() == []


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_two_workers_measure_judge_and_merge(toy):
    toy.plan(**{"a16w8-torchao-compiled": "fail", "a8w8-torchao-eager": "skip", "bf16-torch-compiled": "unmeasured"})
    result = toy.run(
        *("benches", "-n", "auto", "--benchmark-json=out.json", "--junitxml=junit.xml", "--benchmark-only"),
        *("--benchmark-autosave", "--dist=loadfile"),
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=CASES - 3, failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        ["lowbit: 2 worker(s), one GPU each (0, 1)*", "lowbit: --dist loadfile is not used for benches"]
    )
    # One table, one JSON, one saved run, all of the controller: the failed gate's case is in, with its three rounds.
    measured = {row["name"]: row for row in toy.json()["benchmarks"]}
    assert len(measured) == len(toy.json()["benchmarks"]) == CASES - 2
    assert "test_decode[a16w8-torchao-compiled-b1_c0]" in measured
    assert all(len(row["stats"]["data"]) == 3 and row["group"] == "decode" for row in measured.values())
    assert result.stdout.str().count("benchmark 'decode':") == 1
    assert len(list(toy.path.glob(".benchmarks/*/*.json"))) == 1
    # The records came one by one, from two workers with a device each, and no format was split.
    records = {record["case"].partition("::")[2]: record for record in toy.kept()}
    assert len(records) == CASES - 1
    assert records["test_decode[a8w8-torchao-eager-b1_c0]"]["outcome"] == "skipped"
    workers = {(r["info"]["worker"], r["info"]["device"]) for r in records.values()}
    assert workers == {("gw0", "0"), ("gw1", "1")}
    for name in FORMATS:
        assert len({record["info"]["pid"] for record in records.values() if record["format"] == name}) == 1
    # Every worker counts the controller and its sibling as its own.
    pids = {record["info"]["pid"] for record in records.values()}
    assert all(pids | {r["info"]["parent"]} <= set(r["info"]["own_pids"]) for r in list(records.values())[-1:])
    assert [len(line["collected"]) for line in toy.lines() if "collected" in line] == [CASES]
    suite = ElementTree.parse(toy.path / "junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (str(CASES), "2", "0")
    failures = [failure.get("message") for failure in suite.iter("failure")]
    assert any("decode_tok_s 200 -> 100 tok/s" in message for message in failures)
    assert "lowbit_result" not in (toy.path / "junit.xml").read_text()


def test_a_worker_that_dies_costs_one_test_and_its_device_is_used_again(toy):
    toy.plan(**{"bf16-torch-eager": "die", "a16w8-torchao": "linger"})
    result = toy.run("benches", "-n", "2", "--junitxml=junit.xml", "--benchmark-json=out.json")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    result.stdout.fnmatch_lines(["*worker 'gw?' crashed while running*bf16-torch-eager*"])
    assert (toy.path / "deaths").read_text() == "x"
    assert len(toy.kept()) == len(toy.json()["benchmarks"]) == CASES - 1
    devices = {record["info"]["worker"]: record["info"]["device"] for record in toy.kept()}
    survivor = next(record["info"] for record in toy.kept() if record["format"] == "a16w8-torchao")
    assert devices["gw2"] == {"0": "1", "1": "0"}[survivor["device"]]


def test_one_worker_on_the_cpu_is_allowed_and_survives_its_crash(toy, monkeypatch):
    monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "0")
    toy.plan(**{"a16w8-torchao-eager": "die"})
    result = toy.run("benches", "-n", "1", "-k", "torchao")
    result.assert_outcomes(passed=CASES - 3, failed=1)
    result.stdout.fnmatch_lines(["lowbit: 1 worker(s), on the CPU*"])
    assert {record["info"]["device"] for record in toy.kept()} == {None}


@pytest.mark.parametrize("args", [["-n", "0"], ["-p", "no:xdist"], ["--dist", "load"], ["-n", "auto"]])
def test_without_workers_benches_are_timed_as_ever(toy, monkeypatch, args):
    monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "0")
    result = toy.run("benches", *args, "--benchmark-json=out.json", "-k", "bf16", "--benchmark-only")
    result.assert_outcomes(passed=2)
    assert [row["stats"]["rounds"] for row in toy.json()["benchmarks"]] == [3, 3]


def test_first_failure_ends_the_run(toy):
    toy.plan(**{"bf16-torch-eager": "fail"})
    result = toy.run("benches", "-n", "2", "-x")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 1
    assert outcomes.get("passed", 0) < CASES - 1


def test_tests_under_xdist_stay_as_they_are(toy, monkeypatch):
    monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "0")
    (toy.path / "tests").mkdir()
    (toy.path / "tests" / "test_it.py").write_text(
        "import os\ndef test_it(benchmark):\n    benchmark(int)\n    assert benchmark.disabled\n"
        "    assert 'CUDA_VISIBLE_DEVICES' not in os.environ\n"
    )
    result = toy.run("tests", "-n", "2", "--benchmark-json=out.json", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert "lowbit:" not in result.stdout.str()


def test_an_interrupt_keeps_what_was_finished(toy):
    toy.plan(**{"a8w8-torchao-compiled": "hang"})
    options = ["-n", "2", "--benchmark-json=out.json", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benches", *options]
    with subprocess.Popen(command, cwd=toy.path, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + GUARD_S
            hanging = toy.path / "hanging"
            while not (hanging.exists() and hanging.read_text() and len(toy.kept()) >= CASES - 2):
                assert time.monotonic() < deadline, "the hanging test was never reached"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=GUARD_S)
        finally:
            process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert len(toy.json()["benchmarks"]) == len(toy.kept()) >= CASES - 2
    assert gone(int((toy.path / "hanging").read_text()))
