"""A pytest project of toy benches that measure nothing, for the tests of workers and children: no model, no torch.

``plan.json`` in its folder says how they behave: ``{"<part of a node id>": ACT}``, an ACT being one of "fail", "die",
"hang", "linger", "skip" and "unmeasured".
What the controller is told goes to ``kept.jsonl``, a line a record.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import lowbit

GUARD_S = 240.0
"""Ends a process that hangs. Starting one takes a second on an idle machine and half a minute on a crowded one."""

FORMATS = ("bf16-torch", "a16w8-torchao", "a16w4_g128-torchao", "a8w8-torchao")

CONFTEST = """
import json
import os
import sys
import time
import types
from pathlib import Path

import pytest

# The plugin's modules without its own hooks: those of this file stand in their place.
package = types.ModuleType("lowbit.pytest_plugin")
package.__path__ = [PACKAGE]
sys.modules["lowbit.pytest_plugin"] = package

from lowbit.pytest_plugin import children, keys, xdist
from lowbit.pytest_plugin.foreign import ForeignBenchmark
from lowbit.record import Record

FOLDER = Path(__file__).parent
RECORDS, STATS = {}, {}


def requested(config):
    return any(word in str(argument) for argument in config.args for word in ("benches", "mixed"))


def pytest_addoption(parser, pluginmanager):
    parser.addoption("--lowbit-child", type=Path)
    parser.addoption("--lowbit-device", type=int)
    parser.addoption("--model", default="auto")
    parser.addoption("--text", type=Path)
    parser.addoption("--recipe", type=Path)
    parser.addoption("--isolate", action="store_true")
    pluginmanager.register(xdist.Workers(requested), xdist.Workers.NAME)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    workers = xdist.prepare(config)
    workers.on_record, workers.on_collected = keep, lambda ids: keep_line({"collected": ids}) is None
    if config.option.lowbit_child is not None:
        children.watch_parent()


def keep(record, stats):
    keep_line({"record": record.to_dict(), "rounds": stats["stats"]["rounds"] if stats else None})


def keep_line(line):
    with (FOLDER / "kept.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\\n")


def pytest_collection_finish(session):
    (FOLDER / f"collected by {os.environ.get('PYTEST_XDIST_WORKER')}").touch()


def pytest_sessionfinish(session):
    if session.config.option.lowbit_child is not None:
        children.write_result(session.config.option.lowbit_child, RECORDS, STATS)


def plan(nodeid):
    path = FOLDER / "plan.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    return next((act for part, act in rows.items() if part in nodeid), None)


@pytest.fixture
def measure(request, benchmark):
    def measure(format):
        item, act = request.node, plan(request.node.nodeid)
        config = request.config
        if act == "die":
            (FOLDER / "deaths").open("a").write("x")
            print("dying of a test", flush=True)
            os._exit(9)
        if act == "hang":
            (FOLDER / "hanging").write_text(str(os.getpid()))
            time.sleep(300)
        if act == "linger":  # until a dead worker's replacement is there, and can be given work
            deadline = time.monotonic() + 120
            while not (FOLDER / "collected by gw2").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(1)
        record = Record(
            case=item.nodeid, kind="decode", format=format, mode="eager", workload="b1_c0", model=config.option.model,
            load_format="auto", metrics={"decode_tok_s": 100.0},
            info={"device": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(),
                  "worker": os.environ.get("PYTEST_XDIST_WORKER"), "variable": os.environ.get("TOY_VARIABLE"),
                  "own_pids": sorted(children.own_pids()), "parent": os.getppid()},
        )
        if act == "skip":
            record.outcome = "skipped"
            item.stash[keys.RECORD] = record
            pytest.skip("capability: needs SM100")
        if act == "unmeasured":
            pytest.fail("before it was measured")
        if config.option.isolate and config.option.lowbit_child is None:
            record, stats = children.run_case(config, item.nodeid)
            foreign = ForeignBenchmark.for_item(item, stats, {"lowbit": record.metrics})
            config.pluginmanager.get_plugin("pytest-benchmark").benchmarks.append(foreign)
            benchmark._mode = "elsewhere"
            benchmark.stats = foreign
        else:
            benchmark.extra_info["lowbit"] = record.metrics
            benchmark.pedantic(time.sleep, args=(0.001,), rounds=3)
            stats = benchmark.stats.as_dict(include_data=True)
        item.stash[keys.RECORD], item.stash[keys.STATS] = record, stats
        RECORDS[item.nodeid], STATS[item.nodeid] = record, stats
        if act == "fail":
            record.error = "decode_tok_s 200 -> 100 tok/s"
            pytest.fail(f"{item.name}: {record.error}", pytrace=False)
    return measure
"""

BENCH = """
import pytest


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize(
    ("format", "mode"),
    [(format, mode) for format in FORMATS for mode in ("eager", "compiled")],
    ids=[f"{format}-{mode}-b1_c0" for format in FORMATS for mode in ("eager", "compiled")],
)
def test_decode(format, mode, measure):
    measure(format)
"""


class Toy:
    """The project on disk, run as a process of its own with a time limit."""

    def __init__(self, pytester, monkeypatch):
        self.pytester, self.path = pytester, Path(pytester.path)
        package = str(Path(lowbit.__file__).parent / "pytest_plugin")
        pytester.makeconftest(CONFTEST.replace("PACKAGE", repr(package)))
        (self.path / "benches").mkdir()
        (self.path / "benches" / "test_decode.py").write_text(BENCH.replace("FORMATS", repr(FORMATS)))
        pytester.makeini("[pytest]\n")
        for name in ("CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "LOWBIT_ROOT_PID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "2")

    def plan(self, **acts):
        (self.path / "plan.json").write_text(json.dumps(acts))

    def run(self, *args, timeout=GUARD_S):
        return self.pytester.runpytest_subprocess("-p", "no:cacheprovider", *args, timeout=timeout)

    def kept(self):
        """What the controller was told of: records in the order in which they came."""
        return [line["record"] for line in self.lines() if "record" in line]

    def lines(self):
        path = self.path / "kept.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def json(self, name="out.json"):
        return json.loads((self.path / name).read_text())


def gone(pid, within_s=GUARD_S):
    """True once the process has ended; False when it has not within this time."""
    deadline = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
