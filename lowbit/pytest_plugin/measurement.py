"""One case of a run: measured here, in a fresh process, or taken from the run that --resume goes on with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lowbit.cases import Case
from lowbit.errors import LoadError, LowbitError
from lowbit.faults import is_device_fault, is_out_of_memory, own_frames
from lowbit.pytest_plugin import gate
from lowbit.pytest_plugin.foreign import ForeignBenchmark, as_dict_of
from lowbit.pytest_plugin.keys import CASE, UNLOADABLE
from lowbit.record import Record
from lowbit.report.terminal import first_line

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession


def obtain(bench: BenchSession, item: pytest.Item, benchmark: Any) -> Record:
    """Measure a case here, in a fresh process, or take it from the resumed run.

    Exceptions leave a failed record in ``records``, for the caller to keep. Raises LowbitError for what the user
    can mend, out-of-memory included; a library's own error stays as it is.
    """
    case: Case = item.stash[CASE]
    bench.records.pop(item.nodeid, None)  # of an earlier attempt, where a plugin reruns failures
    entry = bench.resumed.get(item.nodeid)
    if entry is not None:
        _present(bench, item, benchmark, entry.record, as_dict_of(entry.stats))
        return entry.record
    # After a CUDA fault not even the card's free memory can be asked for here: the fresh process decides.
    try:
        unmet = bench.lab.unmet(case) if bench.poisoned is None else None
        if unmet is not None:
            record = _blank(bench, case, item.nodeid)
            record.outcome, record.unmet = "skipped", unmet
            return record
        if bench.poisoned is not None or bench.settings.isolate:
            return _measure_elsewhere(bench, item, benchmark)
        record = bench.lab.measure(case, item.nodeid, benchmark.pedantic)
        if bench.blocking and case.workload is not None:
            record.outcome, record.error = "void", gate.BLOCKING
        elif record.outcome == "void" and bench.settings.child is None:
            bench.progress(f"{case.name}: disturbed ({record.error}); once more in a fresh process")
            return _measure_elsewhere(bench, item, benchmark)
    except Exception as error:
        _note_failure(bench, case, item.nodeid, error)
        if is_out_of_memory(error):
            raise LowbitError(
                f"out of memory on {bench.device.name}: {first_line(str(error))}; free it of other processes, "
                "or choose a smaller --model; the other cases go on"
            ) from error
        raise
    return record


def _measure_elsewhere(bench: BenchSession, item: pytest.Item, benchmark: Any) -> Record:
    with bench.lab.spent.on("measure"):
        record, stats = bench.run_child(item.nodeid)
    _present(bench, item, benchmark, record, stats)
    return record


def _present(
    bench: BenchSession, item: pytest.Item, benchmark: Any, record: Record, stats: dict[str, Any] | None
) -> None:
    """Show pytest-benchmark a result of another process, in its table and JSON, in this item's place."""
    benchmark._mode = "measured in another process"  # it warns of an unused fixture otherwise
    plugin: Any = bench.config.pluginmanager.get_plugin("pytest-benchmark")
    if benchmark.stats in plugin.benchmarks:  # what a disturbance spoilt here
        plugin.benchmarks.remove(benchmark.stats)
    benchmark.stats = None
    if stats is not None:
        foreign = ForeignBenchmark.for_item(item, stats, {"lowbit": record.to_dict(samples=False)})
        plugin.benchmarks.append(foreign)
        benchmark.stats = foreign


def _blank(bench: BenchSession, case: Case, nodeid: str) -> Record:
    return case.record(nodeid, bench.choice.name, bench.choice.load_format)


def _note_failure(bench: BenchSession, case: Case, nodeid: str, error: Exception) -> None:
    record = _blank(bench, case, nodeid)
    record.outcome = "failed"
    if isinstance(error, LoadError):
        record.info[UNLOADABLE] = True
    if isinstance(error, LowbitError):
        record.error = str(error)
    else:
        record.error = f"{type(error).__name__}: {error}"
        record.info["raised_in"] = own_frames(error)
    bench.records[nodeid] = record
    if is_device_fault(error):
        bench.poisoned = record.error
        return
    try:
        bench.lab.release()
    except RuntimeError as late:  # a fault shows where the device is next waited for
        if not is_device_fault(late):
            raise
        bench.poisoned = str(late)
