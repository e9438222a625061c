"""The Markdown summary: verdict first, one screen at most, and nothing in a name or message becomes mark-up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import report_runs
from fakes import Bench

from lowbit import baselines, regression, runs
from lowbit.report import content, markdown, page, since
from lowbit.report.content import Content
from lowbit.spread import Values

pytest_plugins = ["pytester"]
SLOW = "a16w4_g128-torchao-reduce-overhead-b1_c0"
STEPS = report_runs.Plan(nights=2, step=1, error=report_runs.EVIL + " | `tick` @someone\nsecond line")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return report_runs.build(tmp_path_factory.mktemp("kept"), STEPS)


@pytest.fixture(scope="module")
def judged(kept: tuple[Path, Path, Path]) -> Content:
    accepted, _, last = kept
    return content.of_run(runs.read(last), baselines.load(accepted))


def test_the_verdict_is_the_first_line(judged: Content) -> None:
    first = markdown.summary(judged).splitlines()[0]
    assert first.startswith("### ❌ 2 regressions, 3 cases failed: llama-3.1-8b (dummy weights) on NVIDIA H200")


def test_a_regression_has_base_now_change_limit_spread_and_runs(judged: Content) -> None:
    (line,) = [line for line in markdown.summary(judged).splitlines() if SLOW in line and "decode_tok_s" in line]
    pattern = r"269\.\d → 23\d\.\d tok/s \| -1[12]\.\d % \| 2\.0 % \| 0\.\d\d % \| 3 of 3 \| – \|$"
    assert re.search(pattern, line), line


def test_every_row_of_a_table_has_as_many_cells_as_its_heading(judged: Content) -> None:
    lines = markdown.summary(judged).splitlines()
    tables = [here for here, line in enumerate(lines) if line.startswith("| --- |")]
    assert len(tables) == 2
    for here in tables:
        assert lines[here - 2] == ""  # GitHub takes a table for a paragraph without it
        body = [line for line in lines[here:] if line.startswith("|")]
        rows = [lines[here - 1], *body[: next((n for n, line in enumerate(lines[here:]) if not line), len(body))]]
        assert len(rows) > 3
        assert {line.count(" | ") for line in rows} == {rows[0].count(" | ")}


def test_a_perplexity_has_digits_enough_to_see_a_tenth_of_a_percent() -> None:
    verdict = regression.Verdict("ppl_wikitext2_2048", "regression", baseline=6.2403, now=6.2522, limit=0.00624)
    assert markdown.figures(verdict, None)[0] == "6.2403 → 6.2522"


def test_the_answer_reads_as_a_sentence(judged: Content) -> None:
    assert "\n**Answer** (KL ≤ 0.05): " in markdown.summary(judged)


def test_what_was_upgraded_the_answer_and_the_skips_are_there(judged: Content) -> None:
    told = markdown.summary(judged)
    assert "`torch 2.11.0+cu130 -> 2.12.0+cu130`" in told
    assert (
        'Reproduce: `pytest benches --model llama-3.1-8b --load-format dummy --suite nightly -k "test_decode[' in told
    )
    skipped = r"^Skipped: \d+ × `capability: needs SM100 \(fp4\), this is SM90` \(`a8w8_llmint8-bitsandbytes`\)"
    void = r"\. Void, neither good nor worse: \d+ × `another process came to the card: 4711 \(python, 512 MiB\)`$"
    assert re.search(skipped + void, told, re.M)
    assert "Better, unexplained" in told


def test_an_error_message_is_one_harmless_code_span(judged: Content) -> None:
    lines = [line for line in markdown.summary(judged).splitlines() if "onerror" in line]
    assert len(lines) == 3
    for line in lines:
        outside = "".join(line.split("`")[::2])
        assert not {"<", ">", "@"} & set(outside)
        assert line.count("|") == 9  # the message's own bar did not open a cell
        assert "second line" not in line


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("a <b> & c", "a &lt;b> &amp; c"),
        ("[x](javascript:1) *b* _i_ `c`", r"\[x\](javascript:1) \*b\* \_i\_ \`c\`"),
        ("hello @octocat", "hello @\u200boctocat"),
        ("two\nlines", "two lines"),
    ],
)
def test_plain_text_stays_plain(words: str, shown: str) -> None:
    assert markdown.text(words) == shown


def test_500_cases_that_all_regress_are_one_screen_and_the_rest_is_counted(tmp_path: Path) -> None:
    slower = {"-b": 0.5, "-p": 0.5}
    plan = report_runs.Plan(nights=1, fresh=2, step=0, cases=500, slower=slower, faster={}, skipped="\0")
    accepted, _, last = report_runs.build(tmp_path, plan)
    told = markdown.summary(content.of_run(runs.read(last), baselines.load(accepted)))
    assert len(told.splitlines()) <= 40
    assert re.search(r"^and \d{3,} more, in the report$", told, re.M)


DRIFTING = "decode[a16w8-torchao-reduce-overhead-b1_c0]"


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Nothing failed; one case has lost 0.15 % a night for ten nights, as a warming room does: 1.5 % in all."""
    plan = report_runs.Plan(
        nights=24, step=14, noise=0.001, slower={}, faster={}, failing="\0", drifting={DRIFTING[6:]: 0.0015}
    )
    accepted, root, last = report_runs.build(tmp_path_factory.mktemp("drift"), plan)
    run = runs.read(last)
    return since.with_history(content.of_run(run, baselines.load(accepted)), since.read_history([root], run)[0])


def test_what_gets_worse_within_its_limits_is_told_before_it_fails(drifting: Content) -> None:
    assert drifting.failures == []
    assert [(trend.case.rpartition("::test_")[2], trend.metric) for trend in since.moving(drifting)] == [
        (DRIFTING, "decode_tok_s")
    ]
    voids = drifting.counts["void"]
    words = "nothing got worse beyond its limit"
    assert markdown.headline(drifting).startswith(f"⚠️ {words} in what could be judged; {voids} cases void: ")
    undisturbed = replace(drifting, records=[one for one in drifting.records if one.outcome != "void"])
    assert markdown.headline(undisturbed).startswith(f"✅ {words}: ")
    (line,) = [line for line in markdown.summary(drifting).splitlines() if "Getting worse" in line]
    moved = r"decode\\_tok\\_s 2\d\d\.\d → 2\d\d\.\d tok/s \(-1\.\d %, a drift since 2026-10-2\d, \d+ nights\)"
    told = f"`{re.escape(DRIFTING)}` {moved}"
    assert re.search(rf"^\*\*Getting worse, within the limits:\*\* {told} \(`python -m lowbit trend`\)$", line), line
    assert '<div class="moving"><h3>Getting worse, within the limits</h3><ul><li><a class="case"' in page.render(
        drifting
    )


def test_what_was_accepted_fails_or_is_old_is_not_told_as_moving(drifting: Content) -> None:
    (trend,) = since.moving(drifting)
    assert drifting.baseline is not None
    row = drifting.baseline.rows[trend.case]
    moved = replace(row, metrics={**row.metrics, trend.metric: Values(trend.change.after, (trend.change.after,))})
    rows = {**drifting.baseline.rows, trend.case: moved}
    assert since.moving(replace(drifting, baseline=replace(drifting.baseline, rows=rows))) == []
    failing = regression.Verdict(trend.metric, "regression", baseline=trend.change.before, now=trend.change.after)
    assert since.moving(replace(drifting, verdicts={trend.case: [failing]})) == []
    old = replace(trend, change=replace(trend.change, index=trend.change.end - since.RECENT - 1))
    assert since.moving(replace(drifting, trends=[old])) == []
    over = replace(trend, change=replace(trend.change, end=trend.change.end - 1))
    assert since.moving(replace(drifting, trends=[over])) == []
    better = replace(trend, worse=False)
    assert since.moving(replace(drifting, trends=[better])) == []


def test_how_little_a_noisy_baseline_guards_stands_below_the_verdict(kept: tuple[Path, Path, Path]) -> None:
    """Else "nothing got worse" would be said of what can't fail."""
    run, baseline = runs.read(runs.list_runs(kept[1])[0]), baselines.load(kept[0])
    quiet = content.of_run(run, baseline)
    assert "too wide" not in markdown.summary(quiet)
    noisy = {case: replace(row, metrics=_scattered(row.metrics)) for case, row in baseline.rows.items()}
    told = content.of_run(run, replace(baseline, rows=noisy))
    line = markdown.summary(told).splitlines()[3]
    decodes = sum("decode_tok_s" in row.metrics for row in noisy.values())
    assert line.startswith(
        f"⚠️ {decodes} limits are too wide to guard much: decode\\_tok\\_s of {decodes} cases (up to "
    )
    assert "`--update-baselines --baseline-runs 5`" in line
    assert f"Limits too wide to guard much: {decodes}</summary>" in page.render(told)
    one = next(case for case in noisy if "test_decode" in case and run.entries[case].record.outcome == "measured")
    alone = content.of_run(replace(run, entries={one: run.entries[one]}), told.baseline)
    assert [blunt.case for blunt in alone.blunt] == [one]  # what was not judged is not told of


def _scattered(metrics: Mapping[str, Values]) -> dict[str, Values]:
    """decode_tok_s as five runs of a busy host give it."""
    return {
        name: Values(of.median, tuple(of.median * f for f in (0.6, 0.8, 1.0, 1.2, 1.4)))
        if name == "decode_tok_s"
        else of
        for name, of in metrics.items()
    }


def test_all_parts_at_their_longest_are_one_screen(drifting: Content) -> None:
    """Failures that share something, improvements, upgrades, wide limits, a drift and skips, each beyond its rows."""
    eager = [r.case for r in drifting.records if r.mode == "eager" and r.kind == "decode" and r.outcome == "measured"]
    others = [r.case for r in drifting.records if r.mode != "eager" and r.kind == "prefill" and r.outcome == "measured"]
    worse = {case: [regression.Verdict("energy_j_per_tok", "regression", "J/tok", 1.0, 2.0, 0.1)] for case in eager}
    better = {case: [regression.Verdict("ttft_ms", "improvement", "ms", 2.0, 1.0, 0.1)] for case in others}
    assert min(len(worse), len(better)) > markdown.FAILURES
    full = replace(
        drifting,
        verdicts=worse | better,
        upgrades=[f"package{number} 1 -> 2" for number in range(20)],
        blunt=[regression.Blunt("decode[a]", name, 3.0) for name in ("compile_s", "ttft_ms", "decode_tok_s")],
        skips={f"decode[{number}]": f"capability: reason {number}" for number in range(9)},
    )
    told = markdown.summary(full)
    said = (
        "**In common:** `mode eager`",
        "more, in the report",
        "**Changed since",
        "**Better, unexplained**",
        "⚠️ 3 limits",
    )
    for part in (
        *said,
        "**Getting worse, within the limits:**",
        "**Answer**",
        "Reproduce:",
        "Skipped:",
        "more reasons",
        "Void, neither good nor worse: ",
    ):
        assert part in told, part
    assert len(told.splitlines()) <= 40, told


def test_without_a_baseline_nothing_is_called_good(kept: tuple[Path, Path, Path]) -> None:
    run = runs.read(runs.list_runs(kept[1])[0])
    assert markdown.summary(content.of_run(run, None)).startswith("### 📏 measured, not compared with a baseline:")


def test_a_quiet_night_is_green(tmp_path: Path) -> None:
    accepted, root, _ = report_runs.build(tmp_path, report_runs.Plan(nights=2, slower={}, faster={}))
    told = markdown.summary(content.of_run(runs.read(runs.list_runs(root)[0]), baselines.load(accepted)))
    assert told.startswith("### ✅ nothing got worse: llama-3.1-8b")


def test_an_unfinished_run_is_not_green(kept: tuple[Path, Path, Path]) -> None:
    run = runs.read(runs.list_runs(kept[1])[0])
    told = content.of_run(run, baselines.load(kept[0]))
    assert markdown.headline(told).startswith("✅")
    cut = replace(told, complete=False)
    assert markdown.headline(cut).startswith("⚠️ unfinished run")


def test_a_kept_run_without_its_baseline_still_tells_its_verdicts(kept: tuple[Path, Path, Path]) -> None:
    told = content.of_run(runs.read(kept[2]), None)
    assert told.confirmed
    assert [finding.verdict.runs for finding in told.findings if finding.status == "regression"] == [3, 3]


def test_verdicts_of_another_baseline_are_judged_anew(kept: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old = baselines.load(kept[0])
    later = baselines.load(baselines.save(old, tmp_path))
    moved = replace(later, created="2026-12-01T00:00:00+00:00")
    told = content.of_run(runs.read(kept[2]), moved)
    assert not told.confirmed
    assert {finding.verdict.runs for finding in told.findings if finding.status == "regression"} == {1}


def test_a_bench_run_writes_it_and_says_so(bench: Bench) -> None:
    bench.accept()
    bench.plan(tok_s={"decode[a16w4_g128-torchao-eager-b1_c0]": 80})
    result = bench.run("--benchmark-compare", "--summary", "out/night.md")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["written: out/night.md"])
    told = (bench.root / "out" / "night.md").read_text()
    assert told.startswith("### ❌ 1 regression: embedded on Fake GPU")
    assert "`decode_tok_s` | 100.0 → 80.0 tok/s | -20.0 % |" in told
    assert "| 3 of 3 |" in told


def test_the_step_summary_of_github_is_appended_to(bench: Bench, tmp_path: Path) -> None:
    path = bench.root / "step.md"
    path.write_text("before\n")
    bench.monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    assert bench.run("-k", "eager", "--summary", str(path)).ret == 0
    assert path.read_text().startswith("before\n### 📏 measured, not compared with a baseline: embedded on Fake GPU")


def test_a_place_that_refuses_is_named_and_the_run_stays_kept(bench: Bench) -> None:
    (bench.root / "file").write_text("")
    result = bench.run("-k", "eager", "--summary", "file/night.md")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "can't write file/night.md: " in result.stdout.str()
    assert bench.journal()[-1]["complete"] is True
