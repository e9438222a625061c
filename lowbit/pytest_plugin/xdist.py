"""Several GPUs: ``pytest benches -n K`` runs K xdist workers, each with one GPU of its own, timing on, gate in force.

pytest-benchmark switches itself off under xdist, because tests that share a machine disturb each other. Here every
worker has a device that no other one sees, so it is kept on; each worker judges its own cases in the test; every
result travels to the controller, which alone writes the JSON, the table and the kept run. Used like this::

    def pytest_addoption(parser, pluginmanager):
        pluginmanager.register(Workers(benches_requested), Workers.NAME)  # early: ``-n auto`` is resolved soon after

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(config):
        workers = prepare(config)          # UsageError, exit 4, if -n can't be had; a worker gets its device here
        workers.on_collected = open_run    # controller only: the ids that all workers agree on; False: measure none
        workers.on_record = keep           # controller only: (Record, pytest-benchmark's stats or None), as they come

A bench leaves its result in ``item.stash[RECORD]`` and ``item.stash[STATS]``. A ``LowbitError`` of a callback (a full
disk) ends the run as a usage error: what is measured after it could not be kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.pytest_plugin import cores, gpus
from lowbit.pytest_plugin.foreign import ForeignBenchmark
from lowbit.pytest_plugin.keys import RECORD, STATS
from lowbit.record import Record

DEVICE = "lowbit_device"
"""Key of a worker's input, there in a bench run only: the worker's entry of CUDA_VISIBLE_DEVICES, None on a CPU."""

CORES = "lowbit_cores"
"""Key of a worker's input: the processors that it runs on; without it, all."""

RESULT = "lowbit_result"
"""Attribute of a worker's TestReport: the result as JSON text. Unlike user_properties it stays out of JUnit."""

SENT = pytest.StashKey[bool]()

# What pytest-benchmark's session would do besides timing: the controller's to do, once, with all results.
ONCE: dict[str, Any] = {
    "benchmark_json": None,
    "benchmark_save": None,
    "benchmark_autosave": None,
    "benchmark_compare": [],
    "benchmark_compare_fail": None,
    "benchmark_histogram": [],
    "benchmark_cprofile_dump": [],
}


def prepare(config: pytest.Config) -> Workers:
    """Call first in pytest_configure. Controller: refuse what can't be measured; worker: take the device it was given.

    Raises pytest.UsageError. Does nothing when no benches are asked for, or xdist is not in use.
    """
    workers: Workers | None = config.pluginmanager.get_plugin(Workers.NAME)
    assert workers is not None, "Workers was not registered in pytest_addoption"
    workers.prepare(config)
    return workers


class Workers:
    """The plugin object, one in each process. Its hooks do nothing unless benches are distributed."""

    NAME = "lowbit-workers"

    def __init__(self, requested: Callable[[pytest.Config], bool]) -> None:
        """``requested``: whether this run's arguments ask for benches; ``tests/`` under xdist stay as they are."""
        self.requested = requested
        self.on_record: Callable[[Record, dict[str, Any] | None], None] | None = None
        self.on_collected: Callable[[list[str]], bool] | None = None
        self.devices: list[str] = []
        self._free: list[gpus.Place] = []
        self._taken: dict[str, gpus.Place] = {}
        self._controls = self._works = self._collected = False
        self._measures = True

    def prepare(self, config: pytest.Config) -> None:
        option = config.option
        given = getattr(config, "workerinput", None)
        if given is not None and DEVICE in given:
            self._works = True
            if given[DEVICE] is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = given[DEVICE]
            if given.get(CORES):
                cores.take(given[CORES])
            _configure_benchmark_as(config, dict(ONCE))
        elif given is None and getattr(option, "dist", "no") != "no" and self.requested(config):
            if option.tx and not option.collectonly:
                self.devices, self._free = gpus.claim(config)
                self._controls = True
            _configure_benchmark_as(config, {})

    def pytest_report_header(self, config: pytest.Config) -> list[str]:
        if not self._controls:
            return []
        where = f"one GPU each ({', '.join(self.devices[: len(self._free)])})" if self.devices else "on the CPU"
        if self._free[0][1]:
            where += f" and {len(self._free[0][1])} of the host's processors"
        lines = [f"lowbit: {len(self._free)} worker(s), {where}; formats are spread over them"]
        if config.option.dist != "load":
            lines.append(f"lowbit: --dist {config.option.dist} is not used for benches")
        return lines

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_auto_num_workers(self, config: pytest.Config) -> int | None:
        """``-n auto`` and ``-n logical``: a worker for each GPU; without one, no workers at all."""
        return len(gpus.visible_devices()) if self.requested(config) else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self._controls:
            if not self._free:
                raise RuntimeError(f"no free device for worker {node.gateway.id}: {self._taken}")
            self._taken[node.gateway.id] = self._free.pop(0)
            node.workerinput[DEVICE], node.workerinput[CORES] = self._taken[node.gateway.id]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """The device of a worker that ended or crashed is free for its replacement. xdist may say it twice."""
        if node.gateway.id in self._taken:
            self._free.append(self._taken.pop(node.gateway.id))

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if not self._controls:
            return None
        from lowbit.pytest_plugin.scheduler import FormatScheduling

        return FormatScheduling(config, log, lambda: self._measures)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        if self._controls and not self._collected and self.on_collected is not None:
            self._collected = True  # every worker collects the same, and each says so
            with _usage_errors():
                self._measures = self.on_collected(list(ids))

    def end(self, config: pytest.Config) -> None:
        """End the worker processes of a controller whose tests are done: xdist lets them wait until the session's end,
        and each holds its CUDA context as long as it lives."""
        session = config.pluginmanager.get_plugin("dsession")
        if self._controls and session is not None and session.nodemanager is not None:
            session.nodemanager.teardown_nodes()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        called = call.when != "setup" or report.outcome != "passed"
        if self._works and called and not item.stash.get(SENT, False):
            text = _pack(item)
            if text is not None:
                item.stash[SENT] = True
                setattr(report, RESULT, text)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = getattr(report, RESULT, None)
        if self._controls and text is not None:
            self._receive(report, json.loads(text))

    def _receive(self, report: Any, result: dict[str, Any]) -> None:
        stats: dict[str, Any] | None = result["stats"]
        if stats is not None:
            config = report.node.config
            session = config.pluginmanager.get_plugin("pytest-benchmark")
            session.benchmarks.append(ForeignBenchmark.from_stats(stats, has_error=result["has_error"]))
        if result["record"] is not None:
            if self.on_record is None:
                raise RuntimeError(
                    f"{report.nodeid}: a worker measured it, and nobody keeps its record (Workers.on_record)"
                )
            with _usage_errors():
                self.on_record(Record.from_dict(result["record"]), stats)


def _pack(item: pytest.Item) -> str | None:
    """What a bench left behind, as JSON text; None for a test that measured nothing."""
    from pytest_benchmark.utils import safe_dumps

    fixture = getattr(item, "funcargs", {}).get("benchmark")
    record, stats = item.stash.get(RECORD, None), item.stash.get(STATS, None)
    if stats is None and fixture is not None and fixture.stats:
        stats = fixture.stats.as_dict(include_data=True)
    if record is None and stats is None:
        return None
    has_error = bool(fixture is not None and fixture.has_error)
    text: str = safe_dumps({"record": record.to_dict() if record else None, "stats": stats, "has_error": has_error})
    return text


def _configure_benchmark_as(config: pytest.Config, options: dict[str, Any]) -> None:
    """Let pytest-benchmark's pytest_configure, still to come, see neither xdist nor these options' true values.

    It decides there, once, whether to time and what to write; everybody else (xdist itself, our gate) needs the true
    values before and after. A pair of hooks around it would depend on the order in which plugins were installed.
    """
    for implementation in config.hook.pytest_configure.get_hookimpls():
        if getattr(implementation.plugin, "__name__", "") == "pytest_benchmark.plugin":
            configure = implementation.function

            def configure_alone(config: pytest.Config, configure: Callable[..., Any] = configure) -> None:
                with _hidden(config, options):
                    configure(config)

            implementation.function = configure_alone  # type: ignore[misc]  # declared final; pluggy reads it at each call
            return
    raise pytest.UsageError("benches need pytest-benchmark: it is not loaded (-p no:benchmark?)")


@contextmanager
def _hidden(config: pytest.Config, options: dict[str, Any]) -> Iterator[None]:
    values = {"dist": "no", **options}
    shown = {name: getattr(config.option, name) for name in values if hasattr(config.option, name)}
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
    try:
        vars(config.option).update({name: values[name] for name in shown})
        yield
    finally:
        vars(config.option).update(shown)
        if worker is not None:
            os.environ["PYTEST_XDIST_WORKER"] = worker


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except LowbitError as error:
        raise pytest.UsageError(str(error)) from error
