"""Turns the tables of formats, modes and workloads into parametrized tests, in an order that keeps one format alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbit import baselines, cases, compilers
from lowbit.cases import KINDS, SUITE_MODES, Case
from lowbit.formats import FORMATS
from lowbit.pytest_plugin.keys import CASE
from lowbit.typical import typical_s

if TYPE_CHECKING:
    from lowbit.device import Device
    from lowbit.pytest_plugin.session import BenchSession

PARAMETERS = ("format", "mode", "workload")


def kind_of(function_name: str) -> str | None:
    """``test_decode`` → ``decode``; None for a test that is no bench."""
    kind = function_name.removeprefix("test_")
    return kind if function_name.startswith("test_") and kind in KINDS else None


def is_bench(metafunc: pytest.Metafunc) -> bool:
    return "measure_case" in metafunc.fixturenames and kind_of(metafunc.function.__name__) is not None


def parametrize(metafunc: pytest.Metafunc, suite: str, parameters: int, tasks: Sequence[str] = ()) -> None:
    """One parameter set per case: format, mode and workload as strings, so that pytest-benchmark can group by them."""
    kind: Any = kind_of(metafunc.function.__name__)
    evaluated = cases.evaluation_cases(suite, tasks) if kind == "eval" else []
    rows = [*evaluated, *cases.enumerate_cases(kind, suite, parameters)]
    names = [name for name in PARAMETERS if name in metafunc.fixturenames]
    values = [[_parameter(case, name) for name in names] for case in rows]
    metafunc.parametrize(names, values, ids=[case.id for case in rows])


def _parameter(case: Case, name: str) -> str | None:
    if name == "format":
        return case.format.id
    if name == "mode":
        return case.mode
    return case.workload.id if case.workload else case.task


def attach_cases(
    items: Iterable[pytest.Item],
    suite: str,
    parameters: int,
    timer: Callable[[], float],
    tasks: Sequence[str] = (),
) -> list[pytest.Item]:
    """Give every bench item its Case, its extra keywords and its benchmark options: ``timer`` waits
    for the device. Returns the bench items."""
    of_tables = (case for kind in KINDS for case in cases.enumerate_cases(kind, suite, parameters))
    known = {(case.kind, case.id): case for case in (*of_tables, *cases.evaluation_cases(suite, tasks))}
    benches: list[pytest.Item] = []
    for item in items:
        if not isinstance(item, pytest.Function) or "measure_case" not in item.fixturenames:
            continue
        kind = kind_of(item.originalname)
        case = known.get((kind, item.callspec.id)) if kind and hasattr(item, "callspec") else None  # type: ignore[arg-type]
        if case is None:
            continue
        item.stash[CASE] = case
        item.extra_keyword_matches.update(selectors(case))
        group = case.kind if case.workload is None else f"{case.kind} {case.workload.id}"
        item.add_marker(pytest.mark.benchmark(group=group, timer=timer, disable_gc=True))
        benches.append(item)
    return benches


def selectors(case: Case) -> set[str]:
    """Extra ``-k`` words of a case: its format's (``int4``, ``W4A16``, the library), mode, workload and kind."""
    words = set(case.format.selectors) | {case.kind}
    if case.mode is not None:
        words |= {case.mode, "eager" if case.mode == "eager" else "compiled"}
    if case.workload is not None:
        words |= {case.workload.id, f"batch{case.workload.batch}"}
    if case.task is not None:
        words.add(case.task)
    return words


def leave_out_quality(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases that have no timed kernels, in place: --profile has nothing to say of them."""
    quality = [item for item in items if CASE in item.stash and item.stash[CASE].workload is None]
    if quality:
        config.hook.pytest_deselected(items=quality)
        items[:] = [item for item in items if item not in quality]


def sort_items(items: list[pytest.Item]) -> None:
    """Benches by format, then mode, in place; every other item keeps its place in front."""
    items.sort(key=lambda item: (1, cases.run_order(item.stash[CASE])) if CASE in item.stash else (0, (0, 0, 0)))


def expected_minutes(nodeids: Iterable[str], measured_s: Mapping[str, float], device: Device) -> float:
    """Minutes that the cases will take: their last kept wall time on this device, else a typical one of their kind;
    none where row or mode are not for such a device. Asks no library, for an xdist controller must not import one."""
    return sum(measured_s.get(nodeid, _typical_s(nodeid, device)) for nodeid in nodeids) / 60


def _typical_s(nodeid: str, device: Device) -> float:
    function, _, parameters = nodeid.rpartition("::")[2].partition("[")
    mode = next((mode for mode in SUITE_MODES["full"] if f"-{mode}-" in parameters), None)
    name = parameters.partition(f"-{mode}-")[0].removesuffix("]")
    row = FORMATS.get(name)
    if row and (device.kind not in row.devices or (mode and compilers.unmet(mode, device, row))):
        return 0.0
    return typical_s(device.kind, kind_of(function) or "", mode, name)


VANISHED = "vanished:"
"""Before the test's name, in the id of one that stands for a vanished case."""


class VanishedCase(pytest.Item):
    """A test that only fails: a case that the baseline holds and that the suite no longer collects."""

    def __init__(self, *, message: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.message = message

    def runtest(self) -> None:
        pytest.fail(self.message, pytrace=False)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any, **kwargs: Any) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / self.nodeid.split("::")[0], None, self.name


def vanished_items(session: pytest.Session, bench: BenchSession, benches: Sequence[pytest.Item]) -> list[VanishedCase]:
    """A failing test for each case of the baseline that this command should have collected and did not.

    The command's folders and files say what it asks for: ``pytest benches/test_decode.py`` says nothing of prefill,
    a node id nothing of the other cases. Rows of another suite did not vanish: a nightly baseline has more than quick.
    """
    if bench.baseline is None:
        return []
    collected = {item.nodeid for item in benches}
    parameters = bench.choice.parameters
    whole = not getattr(session.config.option, "lf", False)  # --lf leaves cases out before anyone can count them
    missing = [
        case
        for case in baselines.vanished(bench.baseline, collected)
        if not is_evaluation(case)  # in a baseline or not, it runs where --eval asks for it
        and _asked_for(session.config, case, {nodeid.split("::")[0] for nodeid in collected})
        and (belongs_to_no_suite(case, parameters) or (whole and in_suites(case, [bench.settings.suite], parameters)))
    ]
    return [
        VanishedCase.from_parent(
            session,
            name=f"{VANISHED}{test}",
            nodeid=f"{file}::{VANISHED}{test}",  # of a form that --lf can read back
            message=f"{case} on {bench.device.slug}: in the baseline {bench.baseline.path.name}, no longer collected; "
            f"restore the case, or accept its absence with: {bench.accept_command()}",
        )
        for case in missing
        for file, _, test in [case.partition("::")]
    ]


def _asked_for(config: pytest.Config, case: str, files: set[str]) -> bool:
    """Whether the command names a folder or file that the case's file is in. ``files``: those with collected benches.

    A file that is there and was left out by --ignore was not asked for.
    """
    name = case.split("::")[0]
    option = config.option
    if (option.ignore or option.ignore_glob) and name not in files and (config.rootpath / name).exists():
        return False
    path = (config.rootpath / name).resolve()
    asked = [Path(config.invocation_params.dir, str(word)).resolve() for word in config.args if "::" not in str(word)]
    return any(path.is_relative_to(folder) for folder in asked)


def in_suites(nodeid: str, suites: Iterable[str], parameters: int) -> bool:
    """Whether the tables have this case, for a model of this many parameters, in one of these suites."""
    kind: Any = kind_of(nodeid.split("::")[-1].split("[")[0])
    if kind is None:
        return False
    name = nodeid.partition("[")[2].removesuffix("]")
    if kind == "eval":  # of any task: which ones there are, the harness knows
        return any(name.startswith(f"{case.format.id}-") for s in suites for case in cases.evaluation_cases(s, ["any"]))
    return any(name in {case.id for case in cases.enumerate_cases(kind, suite, parameters)} for suite in suites)


def is_evaluation(nodeid: str) -> bool:
    return kind_of(nodeid.split("::")[-1].split("[")[0]) == "eval"


def belongs_to_no_suite(nodeid: str, parameters: int) -> bool:
    """True for a case that no table knows any more; one that only another suite has did not vanish."""
    return not in_suites(nodeid, cases.SUITE_MODES, parameters)
