"""The table, the notes, the recommendation, the footer and the progress line, from records made by hand."""

from __future__ import annotations

import io
import os
import pty
import re
import time
from types import SimpleNamespace

import pytest

from lowbit.formats import Unmet
from lowbit.record import Record
from lowbit.regression import Verdict
from lowbit.report import layout, terminal
from lowbit.report.progress import Progress

pytest_plugins = ["pytester"]

CASE = "benches/test_{kind}.py::test_{kind}[{id}]"


def speed(fmt, mode, workload="b1_c0", kind="decode", load_format="auto", **metrics):
    case = CASE.format(kind=kind, id=f"{fmt}-{mode}-{workload}")
    return Record(case, kind, fmt, mode, workload, "embedded", load_format, "bf16", metrics=metrics)


def quality(fmt, load_format="auto", **metrics):
    case = CASE.format(kind="quality", id=fmt)
    return Record(case, "quality", fmt, None, None, "embedded", load_format, "bf16", metrics=metrics)


@pytest.fixture
def records():
    """Two formats under two modes on a GPU; the int4 one is the faster and the worse."""
    return [
        quality("bf16-torch", ppl_embedded_512=6.2403),
        speed("bf16-torch", "eager", decode_tok_s=59.8, mbu=0.19, vram_peak_mib=16131.0),
        speed("bf16-torch", "reduce-overhead", decode_tok_s=179.1, mbu=0.58, vram_peak_mib=16402.0),
        speed("bf16-torch", "reduce-overhead", "p512", "prefill", ttft_ms=12.34, prefill_tok_s=41491.0),
        quality("a16w4_g128-torchao", ppl_embedded_512=6.5512, kld_embedded_512_8176tok=0.0312),
        speed("a16w4_g128-torchao", "eager", decode_tok_s=40.0, vram_peak_mib=6100.0),
        speed("a16w4_g128-torchao", "reduce-overhead", decode_tok_s=268.7, mbu=0.35, vram_peak_mib=6144.0),
    ]


def test_rows_join_by_format_and_mode_and_stand_fastest_first(records):
    lines = terminal.table(records, {}).splitlines()
    body = [line.split()[:3] for line in lines[2:6]]
    assert body == [
        ["a16w4_g128-torchao", "reduce-overhead", "268.7*"],
        ["bf16-torch", "reduce-overhead", "179.1"],
        ["bf16-torch", "eager", "59.8"],
        ["a16w4_g128-torchao", "eager", "40.0"],
    ]
    assert lines[2].split()[3:] == ["1.50", "–", "6144", "6.551", "0.0312", "35%", "measured"]
    assert lines[3].split()[3:] == ["1.00", "12.3", "16402", "6.240", "0", "58%", "measured"]
    assert "over bf16-torch in the same mode" in "\n".join(lines[6:])


def test_a_table_is_at_most_100_columns_wide_at_its_widest():
    longest = [
        speed("a16w4_nf4_dq-bitsandbytes", mode, workload, kind, "dummy", **metrics)
        for mode in ("max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead", "regional")
        for kind, workload, metrics in (
            ("decode", "b1_c0", {"decode_tok_s": 12345.6, "mbu": 1.0, "vram_peak_mib": 143771.0}),
            ("decode", "b1_c2048", {"decode_tok_s": 12345.6}),
            ("decode", "b8_c0", {"decode_tok_s": 12345.6}),
            ("prefill", "p512", {"ttft_ms": 12345.6, "prefill_tok_s": 123456.0}),
            ("prefill", "p2048", {"ttft_ms": 12345.6, "prefill_tok_s": 123456.0}),
        )
    ]
    longest.append(quality("a16w4_nf4_dq-bitsandbytes", "dummy", kld_embedded_512_8176tok=4.25e-5))
    longest.append(speed("bf16-torch", "max-autotune-no-cudagraphs", decode_tok_s=0.012))
    judged = {longest[0].case: [Verdict("decode_tok_s", "regression")]}
    text = terminal.table(longest, judged, gated=True)
    assert max(map(len, text.splitlines())) <= layout.WIDTH
    assert "nf4_dq-bnb" in text  # what was shortened, and only because it had to be
    assert "b1_c2048" in text
    assert "123456" in text


def test_a_workload_that_the_first_table_lacks_has_its_speed_in_a_second_one():
    text = terminal.table([speed("bf16-torch", "eager", "b8_c0", decode_tok_s=812.5)], {})
    assert "b8_c0" in text.partition("all workloads")[2]
    assert "812.5" in text
    assert "all workloads" not in terminal.table([speed("bf16-torch", "eager", decode_tok_s=59.8)], {})


def test_dummy_weights_have_no_perplexity_and_the_kl_is_labelled_embedded():
    records = [
        speed("a8w8-torchao", "eager", decode_tok_s=10.0, load_format="dummy"),
        quality("a8w8-torchao", "dummy", ppl_embedded_512=9.87, kld_embedded_512_8176tok=0.0021),
    ]
    text = terminal.table(records, {})
    assert "(embedded)" in text
    assert "n/a" in text
    assert "0.0021" in text
    assert "9.87" not in text


def test_without_a_gpu_the_weights_stand_in_the_place_of_vram():
    text = terminal.table([speed("bf16-torch", "eager", decode_tok_s=10.0, weights_mib=9.5)], {})
    assert "weights" in text
    assert "VRAM" not in text
    assert "9.50" in text


@pytest.mark.parametrize(
    ("status", "metric", "word"),
    [
        ("ok", "decode_tok_s", "ok"),
        ("regression", "decode_tok_s", "REGRESSED"),
        ("missing", "mbu", "MISSING"),
        ("improvement", "decode_tok_s", "faster"),
        ("improvement", "vram_peak_mib", "better"),
    ],
)
def test_the_verdict_of_a_row(status, metric, word):
    record = speed("bf16-torch", "eager", decode_tok_s=10.0)
    verdicts = {record.case: [Verdict("weights_mib", "ok"), Verdict(metric, status)]}
    assert terminal.table([record], verdicts, gated=True).splitlines()[2].split()[-1] == word


def test_a_quality_regression_marks_every_row_of_its_format(records):
    verdicts = {record.case: [Verdict("x", "ok")] for record in records}
    verdicts[records[4].case] = [Verdict("kld_embedded_512_8176tok", "regression")]
    words = {
        tuple(line.split()[:2]): line.split()[-1]
        for line in terminal.table(records, verdicts, gated=True).splitlines()[2:6]
    }
    assert words == {
        ("a16w4_g128-torchao", "reduce-overhead"): "REGRESSED",
        ("a16w4_g128-torchao", "eager"): "REGRESSED",
        ("bf16-torch", "reduce-overhead"): "ok",
        ("bf16-torch", "eager"): "ok",
    }


def test_a_case_that_the_baseline_lacks_is_new_and_a_disturbed_one_void():
    new, void = (speed("bf16-torch", mode, decode_tok_s=1.0) for mode in ("eager", "default"))
    void.outcome, void.error = "void", "other process 4711 used the card"
    text = terminal.table([new, void], {}, gated=True)
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["void", "new"]
    assert "void: decode[bf16-torch-default-b1_c0]: other process 4711" in terminal.notes([new, void], {}, accept=str)


def test_colours_only_when_asked(records):
    verdicts = {records[1].case: [Verdict("decode_tok_s", "regression")]}
    plain = terminal.table(records, verdicts, gated=True)
    painted = terminal.table(records, verdicts, gated=True, color=True)
    assert "\x1b" not in plain
    red = [line for line in painted.splitlines() if line.startswith("\x1b[31m")]
    assert len(red) == 1
    assert "bf16-torch" in red[0]
    assert "eager" in red[0]


@pytest.mark.parametrize(("terminal_columns", "expected"), [(200, 100), (80, 80), (10, 40), (0, 100)])
def test_text_fits_a_narrower_terminal(monkeypatch, terminal_columns, expected):
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((terminal_columns, 24)))
    assert layout.columns() == expected
    assert expected - 5 < max(map(len, layout.hang("word " * 100).splitlines())) <= expected


def test_skips_are_grouped_by_reason_and_failures_named():
    skipped = [speed(fmt, "eager") for fmt in ("a8w8_fp8-torchao", "a16w8-gemlite", "a8w8_fp8-gemlite")]
    for record in skipped:
        record.outcome, record.unmet = "skipped", Unmet("capability", "needs an NVIDIA GPU")
    failed = speed("bf16-torch", "eager")
    failed.outcome, failed.error = "failed", "OutOfMemoryError: tried to allocate 2 GiB\nmore\nlines"
    text = terminal.notes([*skipped, failed], {}, accept=str)
    assert text.splitlines() == [
        "skipped, capability: needs an NVIDIA GPU: 3 cases of a8w8_fp8-torchao, a16w8-gemlite,",
        "  a8w8_fp8-gemlite",
        "failed: decode[bf16-torch-eager-b1_c0]: OutOfMemoryError: tried to allocate 2 GiB",
    ]
    failed.info["raised_in"] = ["lowbit/lab.py:83 measure: took", "lowbit/truth.py:94 measure: weight = …"]
    assert terminal.notes([failed], {}, accept=str) == (
        "failed: decode[bf16-torch-eager-b1_c0]: OutOfMemoryError: tried to allocate 2 GiB (in\n  lowbit/truth.py:94)"
    )


def test_an_unexplained_improvement_comes_with_the_command_that_accepts_it():
    record = speed("bf16-torch", "eager", decode_tok_s=70.0)
    better = Verdict("decode_tok_s", "improvement", "tok/s", baseline=59.8, now=70.0)
    text = terminal.notes(
        [record], {record.case: [better]}, accept=lambda k: f'pytest benches --update-baselines -k "{k}"'
    )
    assert "decode_tok_s 59.8 -> 70.0 tok/s (+17.1 %)" in text
    assert '--update-baselines -k "test_decode[bf16-torch-eager-b1_c0]"' in text


def flat(text):
    return " ".join(text.split())


def recommend(records, max_kld=0.05, max_vram_mib=None):
    return terminal.recommendation(
        records, max_kld=max_kld, max_vram_mib=max_vram_mib, arguments=["--model llama-3.1-8b"]
    )


def test_the_fastest_case_within_both_limits_is_recommended(records):
    text = recommend(records)
    assert "a16w4_g128-torchao · reduce-overhead: 268.7 tok/s (1.50× bf16's best, reduce-overhead)" in flat(text)
    command = text.splitlines()[-1].strip()
    assert command == (
        'reproduce: pytest benches --model llama-3.1-8b -k "test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]"'
    )


def test_a_kl_above_the_limit_leaves_bf16(records):
    assert "bf16-torch · reduce-overhead: 179.1 tok/s (the fastest bf16), KL 0" in flat(
        recommend(records, max_kld=0.01)
    )


def test_when_none_qualifies_the_closest_is_named_with_what_it_misses(records):
    text = flat(recommend(records, max_kld=0.01, max_vram_mib=6000))
    assert "no measured case has KL ≤ 0.01 and VRAM ≤ 6,000 MiB" in text
    assert "Closest: bf16-torch · eager at 59.8 tok/s: it takes 16,131 MiB, 10,131 too many" in text


def test_a_case_without_kl_and_a_void_one_are_never_recommended(records):
    unscored = speed("a16w8-gemlite", "eager", decode_tok_s=900.0, vram_peak_mib=1.0)
    void = speed("bf16-torch", "default", decode_tok_s=800.0, vram_peak_mib=1.0)
    void.outcome = "void"
    text = recommend([*records, unscored, void])
    assert "a16w4_g128-torchao · reduce-overhead: 268.7" in text
    assert text.splitlines()[-1].strip() == (
        "faster, but without a KL in this run (test_quality gives it): a16w8-gemlite · eager"
    )
    alone = flat(recommend([unscored]))
    assert 'its KL is not known (test_quality of this format did not run). Run its test_quality too: -k "a16w8' in alone


def test_what_auto_knows_of_its_choices_kl_is_told_where_the_case_has_none():
    chosen = speed("auto-recipe", "native", decode_tok_s=1000.0, vram_peak_mib=1.0)
    chosen.info["auto"] = {"kld": 0.02564, "kld_of": "embedded"}
    told = flat(recommend([chosen]))
    assert (
        "its KL is not known (test_quality of this format did not run; auto chose it by a KL of 0.02564 of the "
        "embedded model on the calibration text)"
    ) in told
    assert 'Run its test_quality too: -k "auto-recipe"' in told


def test_a_row_without_the_shortest_context_stands_with_its_own(records):
    native = speed("a16w8-lowbit", "native", workload="b1_c128", decode_tok_s=489.6, vram_peak_mib=10_408.0)
    scores = quality("a16w8-lowbit", kld_embedded_512_8176tok=9.2e-5)
    text = recommend([*records, native, scores])
    assert "a16w8-lowbit · native (b1_c128): 489.6 tok/s (2.73× bf16's best, reduce-overhead)" in flat(text)
    assert text.splitlines()[-1].endswith('-k "test_decode[a16w8-lowbit-native-b1_c128]"')
    shorter = speed("a16w8-lowbit", "native", decode_tok_s=500.0, vram_peak_mib=10_400.0)
    assert "a16w8-lowbit · native: 500.0 tok/s" in flat(recommend([*records, native, shorter, scores]))


def test_a_nan_kl_does_not_qualify(records):
    records[4].metrics["kld_embedded_512_8176tok"] = float("nan")
    assert "bf16-torch · reduce-overhead" in recommend(records)


def test_nothing_measured_is_said():
    assert terminal.table([], {}) == "no case was measured"
    assert "none" in recommend([])


def test_the_recommended_command_selects_exactly_that_case(pytester, records):
    ids = [record.case.partition("[")[2].rstrip("]") for record in records if record.kind == "decode"]
    ids += [ids[-1] + "8", "x" + ids[-1]]  # names that contain the recommended one's id
    pytester.makepyfile(f"import pytest\n@pytest.mark.parametrize('x', {ids!r})\ndef test_decode(x): pass\n")
    expression = recommend(records).rpartition('-k "')[2].rstrip('"')
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:benchmark", "-k", expression)
    selected = [line for line in result.outlines if "::" in line]
    assert [line.partition("::")[2] for line in selected] == ["test_decode[a16w4_g128-torchao-reduce-overhead-b1_c0]"]


def test_footer_says_where_the_time_went():
    spent = SimpleNamespace(load=1.0, quantize=2.0, compile=40.0, measure=50.0, quality=3.0, confirm=0.0)
    text = terminal.footer(spent, wall_s=100.0, host_peak_mib=2310.4)
    assert flat(text) == (
        "lowbit: 100.0 s wall: load 1.0, quantize 2.0, compile 40.0, measure 50.0, quality 3.0, own 4.0 s (4.0 %); "
        "peak host memory 2,310 MiB"
    )


@pytest.mark.parametrize("wall_s", [100.0, 1000.0, 10_000.0])
def test_the_footer_keeps_a_percent_sign_beside_its_number(wall_s):
    spent = SimpleNamespace(imports=6.2, quantize=0.5, warmup=0.4, measure=4.2, quality=5.4)
    text = terminal.footer(spent, wall_s=wall_s, host_peak_mib=856.0)
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"\d %\)", text)
    assert "\N{NO-BREAK SPACE}" not in text


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_progress_off_a_terminal_mentions_only_long_steps():
    stream = io.StringIO()
    progress = Progress(stream, quiet_s=0.2, redraw_s=0.02)
    progress.case(7, 24)
    progress.step("short")
    progress.step("compiling")
    wait_for(stream.getvalue)
    time.sleep(0.1)
    progress.done()
    assert stream.getvalue() == "\n[ 7/24] compiling\n"


def test_progress_on_a_terminal_draws_below_the_cursor_and_erases_itself():
    stream = io.StringIO()
    progress = Progress(stream, tty=True, redraw_s=0.02)
    progress("quantizing")
    wait_for(lambda: stream.getvalue().count("quantizing") > 2)
    progress.done()
    drawn = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == drawn  # the clock has stopped
    assert drawn.endswith("\x1b[2K\x1b8")
    assert "\n" not in drawn  # a line feed would move pytest's own line


def test_progress_survives_the_capture_of_its_stream_and_a_dead_terminal():
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as stream:
        progress = Progress(stream)
        assert progress.tty
    progress.step("loading")  # the stream is closed, its duplicate is not
    assert b"loading" in os.read(parent, 4096)
    os.close(parent)
    progress.step("measuring")
    progress.close()


def test_silent_progress_does_nothing():
    progress = Progress(None)
    progress.step("loading")
    progress.close()
