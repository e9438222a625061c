"""The HTML report in a real headless Chromium: it draws, sorts, filters, keeps quiet, and no text becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser as browsers
import pytest
import report_runs
from browser import Opened

from lowbit import baselines, runs
from lowbit.report import content, page, since
from lowbit.report.content import Content
from lowbit.runs import Run

PLAN = report_runs.Plan(nights=14, step=9, error=report_runs.EVIL)
SLOW = "benches/test_decode.py::test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]"
PLOTS = ("plot-quality", "plot-memory", "plot-roofline", "plot-time", "plot-history")
EVIL_NAMES = (
    'benches/test_decode.py::test_decode[<img src=x onerror="document.title=`owned`">-b1_c0]',
    "benches/test_decode.py::test_decode[</script><script>document.title='owned'</script>]",
    "benches/test_decode.py::test_decode[\"'><svg onload=alert(1)>{{data}}]",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsers.launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged last night with a regression since its sixth night, failures with an evil message, skips and voids."""
    made = tmp_path_factory.mktemp("kept")
    accepted, root, last = report_runs.build(made, PLAN)
    run = runs.read(last)
    history, _ = since.read_history([root], run)
    told = since.with_history(content.of_run(run, baselines.load(accepted)), history)
    (made / "report.html").write_text(page.render(told))
    (made / "baseline.html").write_text(page.render(content.of_baseline(baselines.load(accepted))))
    unscored = [replace(r, metrics={}) if r.kind == "quality" else r for r in told.records]
    (made / "unscored.html").write_text(page.render(Content(told.header, unscored)))
    (made / "real.html").write_text(page.render(with_perplexity(run, 6.2403)))
    (made / "lost.html").write_text(page.render(with_perplexity(run, 6.2403, worst=5939.0)))
    scores = [record for record in told.records if record.kind == "quality"]
    (made / "quality.html").write_text(page.render(Content(told.header, scores)))
    for record, name in zip([record for record in told.records if record.kind == "decode"], EVIL_NAMES, strict=False):
        record.case, record.outcome, record.error = name, "failed", report_runs.EVIL
    (made / "evil.html").write_text(page.render(Content(told.header, told.records)))
    return made


def with_perplexity(run: Run, best: float, worst: float | None = None) -> Content:
    """As of real weights: every format has a perplexity that goes with its KL; the last one's may be ``worst``."""
    records = [replace(record, metrics=dict(record.metrics), load_format="auto") for record in run.records()]
    scored = [record for record in records if record.kind == "quality" and record.outcome == "measured"]
    for record in scored:
        kld = next(value for name, value in record.metrics.items() if name.startswith("kld_"))
        record.metrics["ppl_wikitext2_2048"] = best * (1 + kld)
    if worst is not None:
        scored[-1].metrics["ppl_wikitext2_2048"] = worst
    return Content(replace(run.header, load_format="auto"), records)


@pytest.fixture(scope="module")
def report(chromium: Any, folder: Path) -> Iterator[Opened]:
    """Opened once for the tests that change nothing, or put back what they changed."""
    with browsers.opened(chromium, folder / "report.html") as found:
        yield found


def test_it_says_nothing_and_asks_for_nothing(report: Opened, folder: Path) -> None:
    assert report.messages == []
    assert report.requests == [(folder / "report.html").as_uri()]


def test_the_verdict_is_what_one_sees_first(report: Opened) -> None:
    box = report.page.locator("#verdict-words").bounding_box()
    assert box["y"] + box["height"] < browsers.DESKTOP["height"] / 2
    assert report.text("#verdict-words") == "2 regressions, 3 cases failed"


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_is_drawn(report: Opened, plot: str) -> None:
    assert report.page.locator(f"#{plot} svg path").count() > 10
    assert report.page.locator(f"#{plot}").get_attribute("aria-label")


def test_the_frontier_is_drawn_and_a_point_tells_its_case_and_command(report: Opened) -> None:
    report.page.locator("#plot-quality").scroll_into_view_if_needed()
    svg = report.page.locator("#plot-quality svg")
    assert svg.locator("path[stroke-dasharray]").count() == 1  # the frontier
    box = svg.locator("path[fill='#0b6fb8']").last.bounding_box()  # one of torchao's squares
    report.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = report.page.locator("#plot-quality .tip")
    tip.wait_for()
    assert re.search(r"-torchao · [\w-]+ · b1_c0", tip.inner_text())
    assert "tok/s" in tip.inner_text()
    assert "MiB VRAM" in tip.inner_text()
    assert '--load-format dummy --suite nightly -k "test_decode[' in tip.locator("code").inner_text()
    report.page.mouse.move(0, 0)


def test_what_got_worse_and_better_is_on_top(report: Opened) -> None:
    states = report.page.eval_on_selector_all("#table tbody .state", "found => found.map(one => one.textContent)")
    assert states[:4] == ["REGRESSED", "failed", "failed", "failed"]
    assert states[4] == "better"
    first = report.text("#table tbody tr:first-child").replace("\n", " ")
    assert re.search(r"-1\d\.\d % 26\d\.\d → 23\d\.\d tok/s.*2\.0 % 0\.\d\d % 3 of 3", first.replace("\t", " "))


def test_it_sorts_by_a_heading_both_ways_and_by_the_keyboard(report: Opened) -> None:
    heading = report.page.locator("#table th[data-column=decode_tok_s] button")
    column = "found => found.map(row => row.cells[7].textContent).filter(text => text !== '–')"
    heading.click()
    falling = [float(text.replace(",", "")) for text in report.page.eval_on_selector_all("#table tbody tr", column)]
    assert len(falling) > 40
    assert falling == sorted(falling, reverse=True)
    heading.focus()
    report.page.keyboard.press("Enter")
    rising = [float(text.replace(",", "")) for text in report.page.eval_on_selector_all("#table tbody tr", column)]
    assert rising == sorted(falling)
    assert report.page.locator("#table th[aria-sort=ascending]").get_attribute("data-column") == "decode_tok_s"
    report.page.locator("#table th[data-column=state] button").click()
    assert report.cases()[0] == SLOW


def test_it_filters_by_words_and_choices_and_says_how_many(report: Opened) -> None:
    every = len(report.cases())
    report.page.fill("#filter-text", "gemlite b8_c0")
    report.page.select_option("#filter-mode", "eager")
    shown = report.cases()
    assert shown
    assert len(shown) < every
    assert all("-gemlite-eager-b8_c0]" in case for case in shown)
    assert report.text("#count") == f"{len(shown)} of {every} cases"
    report.page.click("#filter-clear")
    assert len(report.cases()) == every


def test_the_skips_stand_by_their_reason(report: Opened) -> None:
    assert re.search(r"\d+ × capability: needs SM100 \(fp4\).*a8w8_llmint8-bitsandbytes", report.text("#skips"))


def test_a_library_can_be_left_out(report: Opened) -> None:
    points = report.page.locator("#plot-memory svg path[fill='#0b6fb8']")
    before = points.count()
    report.page.locator("#legend button", has_text="torchao").click()
    assert points.count() < before
    assert report.page.locator("#legend-roofline button[aria-pressed=false]").inner_text().strip() == "torchao"
    report.page.locator("#legend button", has_text="torchao").click()
    assert points.count() == before


def test_a_link_opens_the_case_with_its_history_and_the_change_marked(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "report.html", at="#case=" + SLOW.replace("[", "%5B")) as found:
        assert SLOW in found.text("#case-name")
        assert re.search(r"step -1\d\.\d %", found.page.locator("#plot-history svg").inner_html())
        assert re.search(r"step of -1\d\.\d % since 2026-10-21 \(5 nights", found.text("#case-changes"))
        assert "torch 2.11.0+cu130 → 2.12.0+cu130" in found.text("#changes .night")
        assert found.text("#case-command").endswith(f'-k "{SLOW.rpartition("::")[2]}"')
        assert found.messages == []


def test_the_whole_page_can_be_used_by_the_keyboard(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "report.html") as found:
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("document.activeElement.className") == "skip"
        found.page.keyboard.press("Enter")
        assert found.page.evaluate("location.hash") == "#cases"
        reached = set()
        for _ in range(40):
            found.page.keyboard.press("Tab")
            reached.add(found.page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert {"filter-text", "filter-state", "filter-clear", "case id"} <= reached
        found.page.locator("#table tbody button.case").nth(1).focus()
        found.page.keyboard.press("Enter")
        assert found.page.evaluate("document.activeElement.id") == "history-title"
        assert "failed" in found.text("#case-name")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_two_pages(chromium: Any, folder: Path, scheme: str) -> None:
    with browsers.opened(chromium, folder / "report.html", scheme=scheme) as found:
        text, back = (brightness(found.style("body", name)) for name in ("color", "backgroundColor"))
        assert (text > back) is (scheme == "dark")
        label = found.page.locator("#plot-time svg text").first.get_attribute("fill")
        assert (brightness(label) > 128) is (scheme == "dark")


def test_the_plots_follow_when_the_system_turns_dark(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "report.html") as found:
        found.page.emulate_media(color_scheme="dark")
        found.wait_until("!document.querySelector(\"#plot-memory svg path[fill='#0b6fb8']\")")
        assert found.page.locator("#plot-memory svg path[fill='#5cb0f2']").count() > 3


@pytest.mark.parametrize("name", ["report", "baseline", "evil"])
def test_a_phone_shows_it_without_scrolling_sideways(chromium: Any, folder: Path, name: str) -> None:
    with browsers.opened(chromium, folder / f"{name}.html", screen=browsers.PHONE) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= browsers.PHONE["width"]
        for plot in PLOTS[:4]:
            box = found.page.locator(f"#{plot}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= browsers.PHONE["width"]
        assert found.style("#cases .scroll", "contentVisibility") == "visible"  # skipped only while the page loads
        assert found.messages == []


def test_a_baseline_is_a_report_too(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "baseline.html") as found:
        assert found.text("#verdict-words") == "Baseline: the figures that runs are judged by"
        assert "base → now" not in found.text("#table thead")
        assert found.page.locator("#plot-roofline svg path").count() > 10
        assert found.messages == []


def test_cases_without_a_divergence_are_counted_beside_the_plot(chromium: Any, folder: Path) -> None:
    said = r", without [1-9]\d* of \d+ cases that have none \(test_quality gives it\)"
    with browsers.opened(chromium, folder / "unscored.html") as found:
        assert re.fullmatch(said, found.page.locator("#quality-missing").text_content())
    with browsers.opened(chromium, folder / "baseline.html") as found:
        assert found.page.locator("#quality-missing").text_content() == ""


@pytest.mark.parametrize(("name", "axis"), [("real", "perplexity"), ("lost", "perplexity (log)")])
def test_perplexity_can_be_the_axis_and_has_its_digits(chromium: Any, folder: Path, name: str, axis: str) -> None:
    with browsers.opened(chromium, folder / f"{name}.html") as found:
        found.page.select_option("#pareto-quality", "ppl")
        texts = found.page.locator("#plot-quality svg text").all_text_contents()
        assert axis in texts
        assert any(re.fullmatch(r"6\.2\d+", text) for text in texts) is (name == "real")
        assert "6.2403" in found.text("#table")
        assert "Decode speed against perplexity" in found.text("#pareto")
        assert found.messages == []


def test_without_a_decode_case_there_is_no_empty_plot(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "quality.html") as found:
        assert not found.page.locator("#pareto").is_visible()
        assert not found.page.locator("#roofline").is_visible()
        assert "Pareto" not in found.text("nav")
        assert found.page.locator("#table tbody tr").count() > 5
        assert found.messages == []


def test_neither_a_name_nor_a_message_becomes_markup(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "evil.html") as found:
        for name in EVIL_NAMES:
            found.page.select_option("#case", label=name.rpartition("::test_")[2])
            assert name in found.text("#case-name")
        assert found.page.locator("img, main script, main svg[onload], [onerror]").count() == 0
        assert "owned" not in found.page.title()
        assert report_runs.EVIL in found.text("#verdict")
        assert EVIL_NAMES[0].rpartition("::test_")[2] in found.text("#verdict")
        assert found.messages == []


def test_the_policy_stops_a_script_that_came_in_all_the_same(chromium: Any, folder: Path) -> None:
    with browsers.opened(chromium, folder / "report.html") as found:
        markup = "<img src=x onerror=\"document.title='owned'\">"
        found.page.evaluate("markup => document.body.insertAdjacentHTML('beforeend', markup)", markup)
        found.page.wait_for_timeout(300)
        assert "owned" not in found.page.title()
        assert any("Content Security Policy" in message for message in found.messages)


def brightness(color: str | None) -> float:
    """0 to 255, of ``rgb(…)`` or ``#rrggbb``."""
    assert color is not None
    if color.startswith("#"):
        parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        parts = [int(float(part)) for part in re.findall(r"[\d.]+", color)[:3]]
    return sum(parts) / 3
