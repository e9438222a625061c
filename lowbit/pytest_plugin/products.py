"""benches/test_kernels.py: a test for each kernel and shape, and their table. On request, not part of a suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.pytest_plugin.keys import SESSION
from lowbit.report.products import table

FILE = "test_kernels.py"
MARK = "kernels"
TIMINGS = "lowbit_kernels"
"""In a report's user properties, which come from xdist's workers too, and in pytest-benchmark's extra_info."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: single products, measured by `pytest benches -m {MARK}`")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the file out of `pytest benches` unless its path or its mark is named."""
    if collection_path.name != FILE or collection_path.parent.name != "benches":
        return None
    named = any(FILE in str(word) for word in config.invocation_params.args)
    return None if named or MARK in (config.option.markexpr or "") else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure_product" not in metafunc.fixturenames:
        return
    bench = metafunc.config.stash.get(SESSION, None)
    if bench is None:
        raise pytest.UsageError(f"kernels are measured by `pytest benches/{FILE}`")
    from lowbit import contenders

    known, shapes = contenders.contenders(), contenders.products(bench.choice.config)
    pairs = [(contender.id, shape.name) for contender in known for shape in shapes]
    metafunc.parametrize(("contender", "product"), pairs, ids=contenders.ids(known, shapes))


@pytest.hookimpl(tryfirst=True)  # before -k is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-k int4``, ``W4A16`` and the library's name find kernels as they find the suite's cases."""
    from lowbit import contenders

    found: list[Any] = [item for item in items if "measure_product" in getattr(item, "fixturenames", ())]
    known = {contender.id: contender.format.selectors for contender in contenders.contenders()} if found else {}
    for item in found:
        item.extra_keyword_matches.update(known[item.callspec.params["contender"]])


@pytest.fixture
def measure_product(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """Measure this test's kernel at this test's shape, at every batch; skip where it can't run."""
    from lowbit import contenders, products

    bench = request.config.stash[SESSION]
    assert bench is not None
    values = request.node.callspec.params

    def measure() -> None:
        contender = next(c for c in contenders.contenders() if c.id == values["contender"])
        shape = next(s for s in contenders.products(bench.choice.config) if s.name == values["product"])
        unmet = contender.unmet(bench.device, bench.choice.config)
        if unmet is not None:
            benchmark.skipped = True  # pytest-benchmark warns of an unused fixture otherwise
            pytest.skip(str(unmet))
        try:
            ceilings = bench.lab.ceilings
            timings = products.measure(contender, shape, bench.device, ceilings.read_gb_s, benchmark.pedantic)
        except LowbitError as error:
            benchmark.skipped = True
            pytest.fail(str(error), pytrace=False)
        finally:
            bench.lab.release()
        found = {"timings": [timing.to_dict() for timing in timings], "read_gb_s": ceilings.read_gb_s}
        benchmark.extra_info[TIMINGS] = found
        request.node.user_properties.append((TIMINGS, found))

    return measure


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One table of all products of this run, those of xdist's workers too."""
    found = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == TIMINGS
    ]
    if found:
        terminalreporter.section("kernels")
        for line in table([timing for part in found for timing in part["timings"]], found[0]["read_gb_s"]):
            terminalreporter.write_line(line)
