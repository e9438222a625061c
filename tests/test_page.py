"""The HTML report without a browser: one file, no address in it, nothing of the data becomes markup, true figures."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_runs
from fakes import Bench

from lowbit import __main__, baselines, runs
from lowbit.regression import Blunt
from lowbit.report import content, page, since
from lowbit.report.content import Content
from lowbit.report.page import data, nights, series

pytest_plugins = ["pytester"]
PLAN = report_runs.Plan(nights=14, step=9, cases=90, error=report_runs.EVIL)
SLOW = "benches/test_decode.py::test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]"
VENDOR = Path(page.__file__).parent / "vendor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kept")
    report_runs.build(made, report_runs.Plan(nights=14, step=9, error=report_runs.EVIL))
    return made


@pytest.fixture(scope="module")
def told(folder: Path) -> Content:
    (path,) = (folder / "baselines").rglob("*.json")
    run = runs.read(runs.list_runs(folder / "runs")[-1])
    history, unreadable = since.read_history([folder / "runs"], run)
    assert not unreadable
    return since.with_history(content.of_run(run, baselines.load(path)), history)


@pytest.fixture(scope="module")
def text(told: Content) -> str:
    return page.render(told)


@pytest.fixture(scope="module")
def drawn(text: str) -> dict:
    return json.loads(between(text, '<script type="application/json" id="data">', "</script>"))


def between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.scripts:
            self.scripts[-1] += data


def test_one_file_that_fetches_nothing(text: str) -> None:
    tags = Tags(text)
    assert len(text.encode()) < page.LIMIT_BYTES
    addresses = [value for _, attrs in tags.tags for key, value in attrs.items() if key in ("src", "href", "action")]
    assert addresses
    assert all(value.startswith(("#", "data:,")) for value in addresses if value)
    assert "default-src 'none'" in text


def test_the_policy_names_the_hash_of_every_script_and_no_other(text: str) -> None:
    policy = next(a["content"] for tag, a in Tags(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert len(hashes) == 2
    assert "unsafe-eval" not in policy


def test_a_message_that_tries_to_be_markup_stays_text(text: str, drawn: dict) -> None:
    assert report_runs.EVIL in [reason for reason in drawn["cases"]["reason"] if reason]
    assert report_runs.EVIL not in text
    assert "img" not in {tag for tag, _ in Tags(text).tags}
    assert not [attrs for _, attrs in Tags(text).tags if any(name.startswith("on") for name in attrs)]
    inside = between(text, '<script type="application/json" id="data">', "</script>")
    assert not {"<", ">", "&", "\u2028", "\u2029"} & set(inside)


def test_a_case_whose_name_is_markup_or_a_placeholder_stays_a_name(told: Content) -> None:
    hostile = "benches/test_decode.py::test_decode[</script><b>{{data}}\u2028&amp;]"
    records = [*told.records, report_runs.record(*report_runs.chosen(PLAN)[-1], random.Random(0), PLAN, 0)]
    records[-1].case = hostile
    changed = Content(
        **{**{k: v for k, v in vars(told).items() if k in Content.__dataclass_fields__}, "records": records}
    )
    text = page.render(changed)
    found = json.loads(between(text, '<script type="application/json" id="data">', "</script>"))
    assert hostile in found["cases"]["id"]
    assert text.count("{{data}}") == 1  # in the data alone, not filled in
    assert len(Tags(text).scripts) == 3


def test_the_verdict_stands_in_the_page_without_a_script(text: str) -> None:
    verdict = between(text, '<section id="verdict"', "</section>")
    assert "2 regressions, 3 cases failed" in verdict
    assert re.search(r"decode_tok_s 26\d\.\d → 23\d\.\d tok/s <b>\(-1\d\.\d %\)", verdict)
    assert "beyond it in 3 of 3 runs" in verdict
    assert "σ 0." in verdict
    assert "since 2026-10-21 (step, 5 nights), the night that lowbit_source, torch, triton changed" in verdict
    assert "<b>torch</b> 2.11.0+cu130 → 2.12.0+cu130" in verdict
    assert "Which one to run" in verdict


def test_what_failed_with_the_same_words_is_one_card(text: str) -> None:
    verdict = between(text, '<section id="verdict"', "</section>")
    assert verdict.count('<li class="failed">') == 1
    assert "<b>3 cases failed</b>: " in between(verdict, '<li class="failed">', "</li>")
    assert between(verdict, '<li class="failed">', "</li>").count('<a class="case"') == 3
    assert verdict.count('<li class="regression">') == 1  # decode_tok_s and energy_j_per_tok of one case


def test_the_answer_has_its_figures_beside_bf16s(text: str) -> None:
    tiles = between(text, '<dl class="tiles">', "</dl>")
    for words in ("decode", "TTFT of 512 tokens", "energy", "VRAM", "KL divergence"):
        assert f"<dt>{words}</dt>" in tiles
    assert re.search(r"<small>1\.\d\d× bf16&#x27;s 18\d\.\d</small>", tiles)


def test_the_kv_cache_that_a_step_reads_is_told_apart(told: Content, drawn: dict) -> None:
    here = drawn["cases"]["id"].index("benches/test_decode.py::test_decode[bf16-torch-eager-b8_c0]")
    assert drawn["cases"]["kv"][here] == pytest.approx(8 * 131072 * (5 + 127 / 2), rel=1e-4)
    assert drawn["cases"]["kv"][drawn["cases"]["kind"].index("quality")] is None


def test_columns_hold_the_runs_figures(told: Content, drawn: dict) -> None:
    here = drawn["cases"]["id"].index(SLOW)
    record = next(record for record in told.records if record.case == SLOW)
    assert drawn["values"]["decode_tok_s"][here] == pytest.approx(record.metrics["decode_tok_s"], rel=1e-4)
    assert told.baseline is not None
    median = told.baseline.rows[SLOW].metrics["decode_tok_s"].median
    assert drawn["base"]["decode_tok_s"][here] == pytest.approx(median, rel=1e-4)
    assert drawn["cases"]["state"][here] == "REGRESSED"
    assert drawn["cases"]["library"][here] == "torchao"
    assert drawn["ceilings"]["read_gb_s"] == report_runs.READ_GB_S
    assert {len(column) for column in drawn["cases"].values()} == {len(told.records)}
    row = next(row for row in drawn["verdicts"][str(here)] if row[0] == "decode_tok_s")
    assert (row[1], row[5], row[6]) == ("regression", 3, 3)


def test_the_cards_state_and_every_version_stand_in_the_environment(told: Content, text: str) -> None:
    shown = " ".join(re.sub(r"<[^>]+>", " ", between(text, 'id="environment"', "</section>")).split())
    clocks = [state["sm_mhz"] for record in told.records for state in (record.info.get("card") or {}).values()]
    assert f"SM clock {min(clocks):.0f} – {max(clocks):.0f}, median " in shown
    held = re.search(r"clocks held back by sw_power_cap \((\d+) of (\d+)\)", shown)
    assert held is not None
    assert 0 < int(held[1]) < int(held[2]) == len(clocks)
    assert "temperature" in shown
    for package, version in told.header.environment.items():
        assert re.search(rf"{re.escape(package)} (\S+ )?{re.escape(version)}", shown), (
            package
        )  # the baseline's before it


def test_the_history_reads_back_and_its_change_is_marked(told: Content, drawn: dict) -> None:
    past, here = drawn["history"], drawn["cases"]["id"].index(SLOW)
    assert len(past["nights"]) == 14
    low, unit, coded = past["series"]["decode_tok_s"][str(here)]
    assert told.history is not None
    expected = told.history.series(SLOW, "decode_tok_s")
    assert series.decode(low, unit, coded) == pytest.approx(expected, rel=1e-4)
    assert [(row[0], row[1], row[2], row[3]) for row in past["changes"]] == [(here, "decode_tok_s", "step", 9)]
    assert [night for night, _ in past["upgrades"]] == [9]


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [5.0, 5.0], [math.nan, 1e-9, 4e9, math.nan], [0.0], [-2.0, 7.5]])
def test_a_series_survives_its_coding_within_half_a_unit(values: list[float]) -> None:
    coded = series.encode(values)
    assert coded is not None
    for value, back in zip(values, series.decode(*coded), strict=True):
        assert math.isnan(back) if math.isnan(value) else abs(value - back) <= 0.5001 * coded[1]
    assert len(coded[2]) == 2 * len(values)
    assert not set(coded[2]) & set("\"\\<>& '") - {"'"}


def test_a_series_without_a_value_has_no_code() -> None:
    assert series.encode([math.nan]) is None


def test_numbers_that_json_has_not_are_null() -> None:
    assert data._clean({"a": [math.nan, math.inf, 1.5], "b": Path("x")}) == {"a": [None, None, 1.5], "b": "x"}


def test_more_history_than_fits_loses_its_oldest_nights_and_says_so(
    told: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nights, "CHARACTERS", 3_000)
    past = data.collect(told)["history"]
    assert 2 <= len(past["nights"]) < 14
    assert len(past["nights"]) + past["dropped"] == 14
    assert past["nights"][-1] == "2026-10-25T02:17"


# -- colours -----------------------------------------------------------------------------------------------------------

TEXT_ON = {
    "text": ("bg", "panel", "stripe", "bad-bg", "good-bg", "warn-bg"),
    "muted": ("bg", "panel", "stripe", "bad-bg", "good-bg", "warn-bg"),
    "accent": ("bg", "panel", "stripe"),
    "bad": ("panel", "bad-bg"),
    "good": ("panel", "good-bg"),
    "warn": ("panel", "warn-bg"),
}


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2, its definition)."""
    digits = color.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_as_it_is_defined() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_plots_stand_out_in_light_and_dark(scheme: int) -> None:
    """4.5 to 1 for text, 3 to 1 for what is drawn: WCAG 2.2, 1.4.3 and 1.4.11."""
    folder = VENDOR.parent
    roots = re.findall(r":root\{([^}]*)\}", (folder / "style.css").read_text())
    colors = dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", roots[scheme]))
    for name, backgrounds in TEXT_ON.items():
        for background in backgrounds:
            assert contrast(colors[name], colors[background]) >= 4.5, (name, background)
    libraries = re.findall(r'\["(#\w{6})", "(#\w{6})", "\w+"\]', (folder / "js" / "charts.js").read_text())
    assert len(libraries) >= 11
    drawn = [pair[scheme] for pair in libraries] + [colors[name] for name in ("reading", "cache", "rest")]
    for color in drawn:
        assert contrast(color, colors["panel"]) >= 3, color


# -- the vendored library ----------------------------------------------------------------------------------------------


def test_the_plot_library_is_the_one_that_was_fetched_with_its_licences() -> None:
    file = VENDOR / "echarts.common.min.js"
    script = (Path(__file__).parents[1] / ".ci" / "fetch_echarts").read_text()
    version = re.search(r"^version=(.+)$", script, re.M)
    digest = re.search(r"^sha256=(.+)$", script, re.M)
    assert version is not None
    assert digest is not None
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest[1]
    assert f't.version="{version[1]}"' in file.read_text()
    assert f"ECharts {version[1]}" in page.markup.footer()
    licences = (VENDOR / "LICENSE.txt").read_text()
    for words in ("Apache License", "BSD 3-Clause License", "zrender", "d3"):
        assert words in licences
    assert "Apache Software Foundation" in (VENDOR / "NOTICE.txt").read_text()


# -- the command and the option ----------------------------------------------------------------------------------------


def report(*words: object) -> int:
    return __main__.main(["report", *map(str, words)])


def test_the_command_takes_the_newest_kept_run_its_baseline_and_its_history(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, brief = tmp_path / "deep" / "report.html", tmp_path / "summary.md"
    options = ("--history", folder / "runs", "--baselines-dir", folder / "baselines", "--summary", brief)
    assert report(*options, "-o", out) == 0
    said = capsys.readouterr().out
    assert said.startswith("❌ 2 regressions, 3 cases failed: llama-3.1-8b (dummy weights) on NVIDIA H200")
    assert f"written: {out} (" in said
    assert "2026-10-25 02:17 UTC" in out.read_text()
    assert "| 3 of 3 | 2026-10-21 (step, 5 nights) |" in brief.read_text()


def test_a_baseline_alone_is_shown_as_it_is(folder: Path, tmp_path: Path) -> None:
    (path,) = (folder / "baselines").rglob("*.json")
    assert report(path, "-o", tmp_path / "base.html", "--history", tmp_path / "none") == 0
    text = (tmp_path / "base.html").read_text()
    assert "Baseline: the figures that runs are judged by" in text
    found = json.loads(between(text, '<script type="application/json" id="data">', "</script>"))
    assert found["ceilings"]["read_gb_s"] == report_runs.READ_GB_S
    skipped = found["cases"]["state"].index("skipped")
    assert found["cases"]["format"][skipped] == "a8w8_llmint8-bitsandbytes"
    assert found["cases"]["library"][skipped] == "bitsandbytes"
    assert not found["history"]["nights"]
    assert found["workloads"][0] == "b1_c0"


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "Each figure is of one run. 5 are asked for: with fewer the gate's limits are wider."),
        (2, "Each figure is the median of 2 runs, each of a fresh process. 5 are asked for: with fewer the gate"),
        (5, "Each figure is the median of 5 runs, each of a fresh process.</p>"),
    ],
)
def test_a_baseline_says_of_how_many_runs_it_is(folder: Path, count: int, told: str) -> None:
    (path,) = (folder / "baselines").rglob("*.json")
    baseline = replace(baselines.load(path), runs=count)
    assert told in page.render(replace(content.of_baseline(baseline), blunt=()))


def test_limits_that_guard_little_are_named(folder: Path) -> None:
    (path,) = (folder / "baselines").rglob("*.json")
    told = replace(content.of_baseline(baselines.load(path)), blunt=[Blunt("decode[<b>]", "compile_s", 3.0)])
    text = page.render(told)
    assert "Limits too wide to guard much: 1</summary>" in text
    assert "<li>decode[&lt;b&gt;]: compile_s limit 300 %</li>" in text


COMMITTED = sorted((Path(__file__).parents[1] / "benches" / "baselines").rglob("*.json"))


def test_every_committed_baseline_makes_an_example_report(tmp_path: Path) -> None:
    for path in COMMITTED:
        assert report(path, "-o", tmp_path / "example.html", "--history", tmp_path / "none") == 0
        text = (tmp_path / "example.html").read_text()
        assert len(text.encode()) < page.LIMIT_BYTES
        found = json.loads(between(text, '<script type="application/json" id="data">', "</script>"))
        assert baselines.load(path).rows.keys() <= set(found["cases"]["id"])
        assert found["ceilings"]["read_gb_s"] > 0
        assert any(found["values"]["mbu"])
        assert '<dl class="tiles">' in text


def test_of_several_runs_the_newest_is_shown_and_the_others_are_its_past(folder: Path, tmp_path: Path) -> None:
    paths = runs.list_runs(folder / "runs")[:3]
    assert (
        report(*reversed(paths), "--history", tmp_path / "none", "--baseline", "none", "-o", tmp_path / "r.html") == 0
    )
    text = (tmp_path / "r.html").read_text()
    found = json.loads(between(text, '<script type="application/json" id="data">', "</script>"))
    assert found["history"]["nights"] == ["2026-10-12T02:17", "2026-10-13T02:17", "2026-10-14T02:17"]
    assert "Measured, not compared with a baseline" in text


def test_runs_of_two_devices_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = runs.read(runs.list_runs(folder / "runs")[0]).header
    with runs.start(tmp_path, type(other)(**{**vars(other), "device": "nvidia-a100"})) as writer:
        writer.close(0)
    assert report(runs.list_runs(folder / "runs")[0], writer.path, "-o", tmp_path / "r.html") == 2
    assert "expected runs of one device" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_newest_run_that_was_killed_as_it_began_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "runs"
    whole = runs.list_runs(folder / "runs")[-1]
    shutil.copytree(whole, kept / whole.name)
    (kept / "30000101T000000.000000Z-1-0000").mkdir()
    (kept / "30000101T000000.000000Z-1-0000" / "journal.jsonl").touch()
    assert report("-o", tmp_path / "r.html", "--history", kept, "--baseline", "none") == 0
    captured = capsys.readouterr()
    assert "left out: " in captured.err
    assert "got no whole line (killed as it began); move its folder away" in captured.err
    assert (tmp_path / "r.html").exists()


def test_without_a_run_the_command_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--history", tmp_path / "none") == 2
    assert "no kept run to report on; make one with `pytest benches`" in capsys.readouterr().err


def test_the_command_brings_no_torch_in() -> None:
    code = "import sys, lowbit.__main__ as m; m.make_parser(); from lowbit.report import page; assert 'torch' not in "
    code += "sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bench_run_writes_its_report(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(pytester, monkeypatch)
    bench.accept()
    bench.plan(tok_s={"decode[a16w4_g128-torchao-eager-b1_c0]": 80}, environment={"torch": "2.14.0"})
    result = bench.run("--benchmark-compare", "--report", "night.html")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["written: night.html"])
    text = (bench.root / "night.html").read_text()
    verdict = between(text, '<section id="verdict"', "</section>")
    assert "1 regression" in verdict
    assert "decode_tok_s 100.0 → 80.0 tok/s <b>(-20.0 %)</b>" in verdict
    assert "<b>torch</b> 2.13.0 → 2.14.0" in verdict
    found = json.loads(between(text, '<script type="application/json" id="data">', "</script>"))
    assert len(found["history"]["nights"]) == 2  # the accepted run's and this one's


def test_a_folder_of_runs_is_its_newest_with_the_others_as_past(folder: Path, tmp_path: Path) -> None:
    options = ("--baselines-dir", folder / "baselines", "--history", tmp_path / "none")
    assert report(folder / "runs", *options, "-o", tmp_path / "by_folder.html") == 0
    assert report("--history", folder / "runs", *options[:2], "-o", tmp_path / "by_history.html") == 0
    assert (tmp_path / "by_folder.html").read_text() == (tmp_path / "by_history.html").read_text()
