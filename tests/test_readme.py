"""README.md and docs/ say what the code does: its metrics and limits, options, workflow and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.metrics import METRICS, Limit, Metric
from lowbit.pytest_plugin.options import add_options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INTERNAL = {"--lowbit-child", "--lowbit-profile"}


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def metric_rows() -> dict[str, str]:
    """Each metric of docs/metrics.md with what it says of its limit."""
    rows = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            names, _, limit = (cell.strip() for cell in line.strip("|").split("|"))
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", names), limit)
    return rows


def word(limit: Limit) -> str:
    if 0 < limit.relative < 1e-6:
        return "any change"
    words = []
    if limit.relative:
        words.append(f"{100 * limit.relative:g} %")
    if limit.absolute > 1e-3:
        words.append("one more" if limit.absolute == 0.5 else f"{limit.absolute:g}")
    if limit.stderrs:
        words.append(f"{limit.stderrs:g} stderr")
    return " and ".join(words)


def test_every_metric_is_defined_and_no_other():
    assert set(metric_rows()) == set(METRICS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_the_limits_are_those_of_the_code(metric: Metric):
    said = metric_rows()[metric.name]
    if metric.limit is None:
        assert said == "–"
        return
    expected = word(metric.limit)
    if metric.limit.absolute > 1:
        expected += f" {metric.unit}"
    if metric.host_bound_limit is not None:
        expected += f" (host-bound {word(metric.host_bound_limit)})"
    assert said == expected


def test_every_option_is_there():
    names = []

    class Parser:
        def getgroup(self, *title: str) -> Parser:
            return self

        def addoption(self, name: str, **settings: object) -> None:
            names.append(name)

    add_options(Parser())  # type: ignore[arg-type]
    table = (ROOT / "docs" / "options.md").read_text()
    assert names
    assert [name for name in names if name not in INTERNAL and name not in table] == []


def test_the_nightly_command_is_what_the_night_runs():
    command = re.search(r"`pytest (benches --benchmark-compare --suite nightly)`", section("Nightly CI"))
    assert command is not None
    assert f"lowbit:nightly {command[1]} " in (ROOT / ".ci" / "nightly").read_text()
    assert command[0] in (ROOT / "docs" / "nightly.md").read_text()


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    lost = []
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in slugs(there)):
            lost.append(target)
    assert lost == []


def test_every_page_is_linked_from_the_readme():
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name}" not in README] == []


def test_the_readme_is_read_in_five_minutes():
    """At some 240 words a minute, beside its tables and code."""
    prose = re.sub(r"```[^`]*```|^(?:    |\|).*$", "", README, flags=re.M)
    assert len(prose.split()) < 1200


def test_printed_tables_fit_a_terminal():
    shown = [line[4:] for line in section("What it prints").splitlines() if line.startswith("    ")]
    assert shown
    assert [line for line in shown if len(line) > 100 and "reproduce:" not in line] == []
