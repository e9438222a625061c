"""lowbit's pytest plugin: the only package that imports pytest. Hooks only; what they do stands in the modules beside.

options.py: the command line; collection.py: cases as tests; session.py: one run's state; measurement.py: one case;
gate.py: its verdicts; updating.py: ``--update-baselines``; patching.py: ``--baseline-patch``; summary.py: what is
printed; reporting.py: files about the run; products.py: single kernels; xdist.py, gpus.py: one GPU per worker;
children.py: fresh processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbit.cases import KINDS
from lowbit.errors import LoadError, LowbitError
from lowbit.pytest_plugin import (
    children,
    collection,
    evaluation,
    gate,
    measurement,
    patching,
    products,
    reporting,
    summary,
    updating,
)
from lowbit.pytest_plugin.keys import CASE, RECORD, SESSION, STATS
from lowbit.pytest_plugin.options import Settings, add_options, refuse_without_path
from lowbit.pytest_plugin.xdist import Workers, prepare
from lowbit.record import Record

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    add_options(parser)
    pluginmanager.register(products, "lowbit-products")
    pluginmanager.register(Workers(benches_requested), Workers.NAME)  # early: ``-n auto`` is resolved soon after


def benches_requested(config: pytest.Config) -> bool:
    """True when an argument lies in a folder ``benches`` or holds one: tests/ alone never pays for a device."""
    if config.option.help or getattr(config.option, "version", 0):
        return False
    root = config.rootpath.resolve()
    for argument in config.args:
        path = Path(config.invocation_params.dir, str(argument).split("::")[0]).resolve()
        parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
        if "benches" in parts or (path / "benches").is_dir():
            return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = None
    compare = getattr(config.option, "benchmark_compare", None)
    if isinstance(compare, str) and Path(config.invocation_params.dir, compare).is_dir():
        # Its value is optional, so a path behind it is taken for a baseline's name, and tests/ would run instead.
        raise pytest.UsageError(
            f"--benchmark-compare {compare}: the folder is taken for a baseline's name; "
            f"write: pytest {compare} --benchmark-compare"
        )
    if not benches_requested(config):
        refuse_without_path(config)
        return
    settings = Settings.from_config(config)
    workers = prepare(config)  # a worker sees its own GPU only; before anything touches CUDA
    children.watch_parent()
    try:
        from lowbit import compilers

        compilers.configure_caches()
        from lowbit.pytest_plugin.session import BenchSession

        session = BenchSession(config, settings, summary.make_progress(config))
    except LowbitError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SESSION] = session
    workers.on_collected, workers.on_record = partial(summary.announce_workers_run, session), session.receive
    if config.option.benchmark_compare_fail and session.baseline is None:
        raise pytest.UsageError(
            "--benchmark-compare-fail: nothing to compare with, give --benchmark-compare too; "
            "lowbit's own limits hold with --benchmark-compare alone"
        )
    summary.quiet_pytest_benchmark(config)
    config.option.benchmark_compare = []  # ours to load, check and judge; shown in its table by the hook below
    config.pluginmanager.register(ComparisonTable(), "lowbit-comparison")


class ComparisonTable:
    """Hands our checked baseline to pytest-benchmark's table, after that plugin has made its session."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        bench = session.config.stash[SESSION]
        plugin: Any = session.config.pluginmanager.get_plugin("pytest-benchmark")
        if bench is not None and bench.baseline is not None and hasattr(plugin, "compared_mapping"):
            rows = {case: {"fullname": case, "stats": stats} for case, stats in bench.baseline.stats.items()}
            plugin.compared_mapping = {bench.baseline.path.stem.partition("_")[0]: rows}  # in brackets behind each name


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    """The device and every library version instead of the host name and a drifting clock."""
    bench = config.stash.get(SESSION, None)
    return None if bench is None else {"device": bench.device.name, "slug": bench.device.slug, **bench.environment}


def pytest_report_header(config: pytest.Config) -> list[str]:
    bench = config.stash.get(SESSION, None)
    return [] if bench is None else summary.header_lines(bench)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    bench = config.stash.get(SESSION, None)
    return True if bench is not None and evaluation.ignores(collection_path, bench.settings.tasks) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.config.stash.get(SESSION, None)
    if collection.is_bench(metafunc):
        if bench is None:
            raise pytest.UsageError(
                "benches are measured by `pytest benches`: no path given lies in a folder `benches`"
            )
        collection.parametrize(metafunc, bench.settings.suite, bench.choice.parameters, bench.tasks)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    bench = config.stash.get(SESSION, None)
    if bench is None:
        return
    from lowbit import measure

    timer, settings = measure.timer(bench.device), bench.settings
    benches = collection.attach_cases(items, settings.suite, bench.choice.parameters, timer, bench.tasks)
    if bench.settings.profile:
        collection.leave_out_quality(config, items)
    collection.sort_items(items)
    items.extend(collection.vanished_items(session, bench, benches))


@pytest.hookimpl(tryfirst=True)  # before the terminal says how much there is to measure
def pytest_collection_finish(session: pytest.Session) -> None:
    bench = session.config.stash.get(SESSION, None)
    if bench is not None and not session.config.option.collectonly:
        found = [item for item in session.items if CASE in item.stash or isinstance(item, collection.VanishedCase)]
        bench.select([item.nodeid for item in found])
        if updating.nothing_to_measure(bench):
            return
        try:
            bench.open_run()
        except LowbitError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    bench = config.stash.get(SESSION, None)
    if bench is None:
        return []
    if not items:
        return summary.nothing_selected_lines(bench)
    return summary.expectation_lines(bench, [item.nodeid for item in items if CASE in item.stash])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With enough kept runs of this environment, --update-baselines has nothing left to measure."""
    bench = session.config.stash.get(SESSION, None)
    if bench is None or session.config.option.collectonly or session.testsfailed:
        return None
    return updating.nothing_to_measure(bench) or None


@pytest.fixture
def measure_case(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[], Record]]:
    """Measure this test's case, keep its record, and judge it against the baseline: all that a bench does."""
    bench, item = request.config.stash.get(SESSION, None), request.node

    def measure() -> Record:
        if bench is None or CASE not in item.stash:
            kinds = ", ".join(f"test_{kind}" for kind in KINDS)
            pytest.fail(f"measure_case is for the functions {kinds} of a folder `benches`", pytrace=False)
        case = item.stash[CASE]
        where = f"{case.name} on {bench.device.slug}"
        stats, failure = None, ""  # pytest.fail inside except would show the error twice, the second time as its effect
        try:
            record: Record = measurement.obtain(bench, item, benchmark)
            if benchmark.stats is not None:
                benchmark.stats.extra_info["lowbit"] = record.to_dict(samples=False)
                stats = benchmark.stats.as_dict(include_data=True)
        except LoadError as error:
            if bench.settings.child is None and not hasattr(request.config, "workerinput"):
                pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)  # once, not in every case
            failure = f"{where}: {error}"
        except LowbitError as error:
            failure = f"{where}: {error}"
        finally:
            if item.nodeid in bench.records:  # of a failure
                _keep(bench, item, bench.records[item.nodeid], None)
        if failure:
            pytest.fail(failure, pytrace=False)
        _keep(bench, item, record, stats)
        try:
            failures = gate.judge(bench, case, record)
        except LowbitError as error:  # a confirming process died
            failures = [f"{where}: {error}"]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        if record.outcome == "skipped":
            pytest.skip(str(record.unmet))
        if record.outcome == "void":
            if benchmark.stats is not None:  # it may have become void as it was judged
                benchmark.stats.extra_info["lowbit"] = record.to_dict(samples=False)
            pytest.skip(f"void{'' if bench.blocking else ', measured twice'}: {record.error}")
        if record.outcome == "failed":
            pytest.fail(f"{where}: {record.error}", pytrace=False)
        return record

    yield measure
    if benchmark._mode is None:
        benchmark._mode = "not timed"  # skipped or failed before; it warns of an unused fixture otherwise


def _keep(bench: BenchSession, item: pytest.Item, record: Record, stats: dict[str, Any] | None) -> None:
    """On disk, and for a worker's controller. A disk that refuses ends the run: no later case could be kept."""
    item.stash[RECORD], item.stash[STATS] = record, stats
    try:
        bench.keep(record, stats)
    except LowbitError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """The progress line counts the cases and is gone before pytest writes the result."""
    bench = item.config.stash.get(SESSION, None)
    if bench is None or CASE not in item.stash:
        return (yield)
    if item.nodeid in bench.selected:
        bench.progress.case(bench.selected.index(item.nodeid) + 1, len(bench.selected))
    try:
        return (yield)
    finally:
        bench.progress.done()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A failed test's traceback keeps its model alive through the next format's load; let go of it."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)


@pytest.hookimpl(tryfirst=True)  # before the terminal's wrapper prints the summary, which tells what came of it
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    bench = session.config.stash.get(SESSION, None)
    if bench is None:
        return
    try:
        bench.close(exitstatus)
        if bench.settings.update_baselines and not bench.in_worker and not session.config.option.collectonly:
            updating.update(bench, exitstatus)
        if not bench.in_worker and not session.config.option.collectonly:
            patching.write_patch(bench)
        reporting.write(bench)
        if not bench.in_worker:
            gate.check_judged(bench)
    except LowbitError as error:
        bench.error = str(error)
        if exitstatus == pytest.ExitCode.OK:  # a failure or Ctrl-C stays what it was
            session.exitstatus = pytest.ExitCode.USAGE_ERROR


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    bench = config.stash.get(SESSION, None)
    if bench is not None:
        summary.write(terminalreporter, bench)


def pytest_unconfigure(config: pytest.Config) -> None:
    bench = config.stash.get(SESSION, None)
    if bench is not None:
        bench.progress.close()
