"""The report of 500 cases × 200 nights: at most 3 MB, and in a real browser there within 3 seconds."""

from __future__ import annotations

import json
from pathlib import Path

import browser as browsers
import pytest
import report_runs

from lowbit.report import page

LIMIT_MS = 3000
TRIES = 5
"""Loads at most, of which one must be within the limit: the other core may be compiling something."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    written = folder / "report.html"
    written.write_text(page.render(report_runs.large(folder, cases=500, nights=200)))
    return written


def test_500_cases_of_200_nights_stay_below_three_megabytes(file: Path) -> None:
    text = file.read_text()
    assert len(text.encode()) < page.LIMIT_BYTES
    past = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["history"]
    assert len(past["nights"]) == 200
    assert past["dropped"] == 0
    assert sum(map(len, past["series"].values())) > 1500


def test_they_are_there_within_three_seconds_and_sort_and_filter_at_once(file: Path) -> None:
    with browsers.launch() as chromium:
        took = []
        while not took or (min(took) > LIMIT_MS and len(took) < TRIES):
            with browsers.opened(chromium, file) as found:
                took.append(int(found.page.locator("html").get_attribute("data-ready") or "0"))
                found.wait_until("document.querySelectorAll('#table tbody tr').length === 500")
                found.page.fill("#filter-text", "b1_c2048")
                found.wait_until("!document.querySelector('#count').textContent.startsWith('500')")
                assert all("b1_c2048" in case for case in found.cases())
                assert found.messages == []
        print(
            f"{file.stat().st_size / 1e6:.2f} MB, drawn after {', '.join(map(str, took))} ms"
        )  # for docs/report.md: -s
        assert min(took) <= LIMIT_MS, took
