"""Baselines: built of several runs, written as pytest-benchmark's JSON, refused when broken or foreign."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kept_runs
import numpy as np
import pytest
from kept_runs import node

from lowbit import baselines, documents, metrics
from lowbit.baselines import Baseline, build, find, load, replace_rows, save
from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.runs import Entry, Header, Run
from lowbit.spread import Values

SUBJECT = ("nvidia-h200", "llama-3.1-8b", "dummy", "embedded_512")


def stats_of(seconds: list[float]) -> dict[str, Any]:
    """What pytest-benchmark makes of these rounds, by its own code."""
    from pytest_benchmark.stats import Stats

    made = Stats()
    for each in seconds:
        made.update(each)
    return {**made.as_dict(), "iterations": 1, "data": seconds}


def entry(case: str, tok_s: float, **fields: Any) -> Entry:
    fields.setdefault("metrics", {"decode_tok_s": tok_s, "graph_breaks": 0.0})
    made = kept_runs.record(case, dtype="bf16", **fields)
    made.samples = {"decode_s": [1 / tok_s] * 3}
    return Entry(made, stats_of([100 / tok_s, 101 / tok_s, 99 / tok_s]) if made.outcome == "measured" else None)


def header(**changes: Any) -> Header:
    return kept_runs.header(**{"environment": {"torch": "2.11.0"}, "started": "2026-01-01", **changes})


def run(*entries: Entry, **changes: Any) -> Run:
    return Run(Path("kept"), header(**changes), {each.record.case: each for each in entries}, True)


def five_runs() -> list[Run]:
    return [run(entry("a", 100.0 + i), entry("b", 200.0 + i)) for i in (3, 1, 0, 2, 4)]


def test_build_takes_the_median_and_keeps_each_run() -> None:
    made = build(five_runs())
    values = made.rows[node("a")].metrics["decode_tok_s"]
    assert values == Values(102.0, (103.0, 101.0, 100.0, 102.0, 104.0))
    assert made.runs == 5
    assert made.stats[node("a")]["median"] == pytest.approx(100 / 102)  # of the median run
    assert "data" not in made.stats[node("a")]
    assert made.environments == [{"torch": "2.11.0"}]


def test_a_cold_cache_is_no_spread_of_compile_seconds() -> None:
    cold = {"compile_s": 40.0, "compiled_anew": 3.0, "decode_tok_s": 90.0}
    warm = [{"compile_s": 5.0 + i, "compiled_anew": 0.0, "decode_tok_s": 100.0 + i} for i in range(3)]
    made = build([run(entry("a", 1.0, metrics=each)) for each in (cold, *warm)])
    assert {name: values.runs for name, values in made.rows[node("a")].metrics.items()} == {
        "compile_s": (5.0, 6.0, 7.0),
        "compiled_anew": (0.0, 0.0, 0.0),
        "decode_tok_s": (90.0, 100.0, 101.0, 102.0),
    }
    uncounted = {"compile_s": 5.0}  # by a lowbit that did not count
    for pair in ([cold] * 2, [uncounted] * 2, [cold, uncounted]):
        made = build([run(entry("a", 1.0, metrics=each)) for each in pair])
        assert len(made.rows[node("a")].metrics["compile_s"].runs) == 2


def test_void_and_failed_records_never_enter() -> None:
    made = build(
        [
            run(entry("a", 100.0), entry("b", 1.0, outcome="failed", metrics={})),
            run(entry("a", 500.0, outcome="void"), entry("b", 1.0, outcome="void")),
            run(entry("a", 102.0)),
        ]
    )
    assert made.rows[node("a")].metrics["decode_tok_s"].runs == (100.0, 102.0)
    assert node("b") not in made.rows


def test_rounding_stays_far_below_every_limit() -> None:
    for name, metric in metrics.METRICS.items():
        made = build([run(entry("a", 1.0, metrics={name: 16060.123456789}))]).rows[node("a")].metrics[name].median
        assert made == pytest.approx(16060.123456789, rel=5e-6)
        if metric.limit is not None and metric.limit.relative:
            assert abs(made / 16060.123456789 - 1) < metric.limit.relative / 20


def test_skips_are_part_of_it(tmp_path: Path) -> None:
    unmet = Unmet("capability", "needs SM100, this is SM90")
    made = build([run(entry("a", 100.0), entry("b", 1.0, outcome="skipped", unmet=unmet, metrics={}))])
    kept = load(save(made, tmp_path))
    assert kept.skips == {node("b"): ("capability", "needs SM100, this is SM90")}
    assert baselines.vanished(kept, [node("a")]) == [node("b")]
    assert baselines.vanished(kept, [node("b"), node("c")]) == [node("a")]
    assert baselines.vanished(kept, [node("a"), node("b")]) == []


def test_a_case_that_stops_running_is_found() -> None:
    made = build(five_runs())
    skipped = entry("a", 1.0, outcome="skipped", unmet=Unmet("package", "needs gemlite"), metrics={}).record
    other = entry("z", 1.0, outcome="skipped", unmet=Unmet("package", "needs gemlite"), metrics={}).record
    assert baselines.new_skips(made, [skipped, other, entry("b", 1.0).record]) == {node("a"): "package: needs gemlite"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_can_not_be_accepted(value: float) -> None:
    with pytest.raises(LowbitError, match="decode_tok_s is not finite"):
        build([run(entry("a", 1.0, metrics={"decode_tok_s": value}))])


def test_build_refuses_nothing_and_mixtures() -> None:
    with pytest.raises(LowbitError, match="at least one kept run"):
        build([])
    with pytest.raises(LowbitError, match=r"foreign to this run \(model: expected llama-3.1-8b, got embedded\)"):
        build([run(entry("a", 1.0)), run(entry("a", 1.0), model="embedded", started="2025")])


def test_round_trip(tmp_path: Path) -> None:
    made = build(five_runs())
    path = save(made, tmp_path)
    assert path == tmp_path / "nvidia-h200" / "0001_llama-3.1-8b-dummy.json"
    assert load(path) == replace(made, path=path)
    assert find(tmp_path, *SUBJECT[:3]) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_untimed_rows_survive(tmp_path: Path) -> None:
    made = build([run(replace(entry("a", 1.0), stats=None))])
    assert load(save(made, tmp_path)).rows == made.rows


def test_saving_again_keeps_the_name_and_another_model_takes_the_next(tmp_path: Path) -> None:
    first = save(build(five_runs()), tmp_path)
    assert save(build(five_runs()[:2]), tmp_path) == first
    assert load(first).runs == 2
    other = save(build([run(entry("a", 1.0), model="meta-llama/Llama-3.1-8B", load_format="auto")]), tmp_path)
    assert other.name == "0002_meta-llama-Llama-3.1-8B-auto.json"
    assert find(tmp_path, "nvidia-h200", "meta-llama/Llama-3.1-8B", "auto") == other


def test_find_takes_the_highest_number_of_that_model_only(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    for name in ("0001_m-auto", "0003_m-auto", "0009_other-auto", "0010_m-dummy", "0011_xm-auto", "m-auto"):
        (folder / f"{name}.json").touch()
    found = find(tmp_path, "nvidia-h200", "m", "auto")
    assert found is not None
    assert found.name == "0003_m-auto.json"
    assert find(tmp_path, "nvidia-h200", "absent", "auto") is None
    assert find(tmp_path, "cpu", "m", "auto") is None


def test_with_k_only_those_rows_are_replaced() -> None:
    old = build(five_runs())
    unmet = Unmet("memory", "needs 20 GiB")
    new = build([run(entry("a", 50.0), entry("b", 60.0), entry("c", 1.0, outcome="skipped", unmet=unmet, metrics={}))])
    merged = replace_rows(old, new, [node("a"), node("c")])
    assert merged.rows[node("a")].metrics["decode_tok_s"].median == 50
    assert merged.rows[node("b")] == old.rows[node("b")]
    assert merged.stats[node("b")] == old.stats[node("b")]
    assert merged.skips == {node("c"): ("memory", "needs 20 GiB")}
    gone = replace_rows(merged, build([run(entry("c", 7.0))]), [node("c"), node("b")])
    assert node("c") in gone.rows
    assert gone.skips == {}
    assert node("b") not in gone.rows  # chosen, and not measured any more
    with pytest.raises(LowbitError, match="foreign"):
        replace_rows(old, build([run(entry("a", 1.0), device="cpu-x")]), [node("a")])


def test_foreign_is_another_subject_and_never_another_version(tmp_path: Path) -> None:
    made = load(save(build(five_runs()), tmp_path))
    baselines.check(made, *SUBJECT)
    for position, what in enumerate(("device", "model", "load format", "quality protocol")):
        other = [*SUBJECT[:position], "other", *SUBJECT[position + 1 :]]
        with pytest.raises(
            LowbitError, match=rf"foreign to this run \({what}: expected other, got {SUBJECT[position]}\)"
        ):
            baselines.check(made, *other)
    upgraded = {"torch": "2.13.0", "triton": "3.7"}
    assert baselines.environment_difference(made, upgraded) == ["torch 2.11.0 -> 2.13.0", "triton none -> 3.7"]
    assert baselines.environment_difference(made, {"torch": "2.11.0"}) == []


def drop(*keys: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        data = json.loads(text)
        part = data
        for key in keys[:-1]:
            part = part[int(key)] if isinstance(part, list) else part[key]
        del part[keys[-1]]
        return json.dumps(data)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: "", "got an empty file"),
        (lambda text: text[: len(text) // 2], "got broken JSON"),
        (lambda text: "[]", "no pytest-benchmark document"),
        (lambda text: "\x00\x01", "broken JSON"),
        (drop("lowbit"), "plain pytest-benchmark file without lowbit's part"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "expected lowbit schema 1, got 2; upgrade lowbit"),
        (lambda text: text.replace('"kind": "baseline"', '"kind": "run"'), "expected a lowbit baseline, got a run"),
        (drop("lowbit", "header"), "missing or of another shape"),
        (drop("lowbit", "header", "model"), "missing or of another shape"),
        (drop("benchmarks", "0", "extra_info", "lowbit"), "missing or of another shape"),
        (lambda text: text.replace('"decode_tok_s":[103.0', '"decode_tok_s":[NaN'), "is not finite"),
        (lambda text: text.replace('"decode_tok_s":[103.0', '"decode_tok_s":["fast"'), "missing or of another shape"),
        (lambda text: re.sub(r'"decode_tok_s":\[.*?\]', '"decode_tok_s":[]', text), "missing or of another shape"),
    ],
)
def test_a_broken_file_gets_a_clear_error(tmp_path: Path, change: Callable[[str], str], complaint: str) -> None:
    path = save(build(five_runs()), tmp_path)
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(LowbitError, match=complaint) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_gets_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="no such lowbit baseline"):
        load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(LowbitError, match="can't read"):
        load(tmp_path / "binary.json")


def test_a_full_disk_leaves_the_old_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(build(five_runs()), tmp_path)
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(LowbitError, match=r"No space left on device; the baseline stays as it was"):
        save(build(five_runs()[:1]), tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(documents, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(build(five_runs()), tmp_path)
    assert list((tmp_path / "nvidia-h200").iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h200").touch()
    with pytest.raises(LowbitError, match=r"can't write .*nvidia-h200.*--baselines-dir"):
        save(build(five_runs()), tmp_path)


@pytest.fixture(scope="module")
def large() -> Baseline:
    """300 cases of decode with every metric that has a value on a GPU, five runs each, of random digits."""
    rng = np.random.default_rng(0)
    names = [
        name
        for name, metric in metrics.METRICS.items()
        if "decode" in metric.kinds and name not in ("speed_ratio", "ttft_ms")
    ]
    info = {"linears": 224, "clock": "1980 MHz" * 10, "throttle": [], "compiler": {"frames": 3}}
    info["ceilings"] = {
        "read_gb_s": 4606.123456,
        "copy_gb_s": 4012.5,
        "matmul_tflop_s": 768.25,
        "read_method": "triton",
    }

    def one(case: int) -> Entry:
        values = {name: float(rng.random() * 1000) for name in names}
        return entry(f"a16w4_g128-torchao-max-autotune-no-cudagraphs-b1_c2048-{case}", 100.0, metrics=values, info=info)

    return build([run(*(one(case) for case in range(300))) for _ in range(5)])


def test_300_cases_stay_below_a_megabyte(large: Baseline, tmp_path: Path) -> None:
    path = save(large, tmp_path)
    assert len(large.rows) == 300
    assert path.stat().st_size < 1_000_000
    kept = next(iter(load(path).rows.values())).info["ceilings"]
    assert kept == {"read_gb_s": 4606.12, "copy_gb_s": 4012.5, "matmul_tflop_s": 768.25}
    text = path.read_text()
    assert '"data"' not in text
    assert '"samples"' not in text
    assert max(map(len, text.splitlines())) < 5_000  # a changed case is one readable line of the diff


def test_pytest_benchmark_itself_reads_it(tmp_path: Path) -> None:
    first = save(build(five_runs()), tmp_path / "one")
    second = save(build(five_runs()[:1]), tmp_path / "two")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(first), str(second), "--columns=median,rounds"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "test_decode[a]" in done.stdout
    assert done.stdout.count("test_decode[b]") == 2


def test_keys_are_pytest_benchmarks(tmp_path: Path) -> None:
    data = json.loads(save(build(five_runs()), tmp_path).read_text())
    assert set(data) == {"machine_info", "commit_info", "benchmarks", "datetime", "version", "lowbit"}
    row = data["benchmarks"][0]
    assert set(row) == {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert set(row["stats"]) == set(documents.STATS)
    assert row["extra_info"]["lowbit"]["metrics"]["decode_tok_s"] == [103, 101, 100, 102, 104]
    assert row["params"] == {"format": "bf16-torch", "mode": "default", "workload": "b1_c0"}


def test_a_case_that_the_newest_run_skips_is_a_skip_whatever_older_runs_measured() -> None:
    old = run(entry("a", 100.0), entry("b", 200.0), started="2026-11-20")
    gone = entry("b", 200.0, outcome="skipped", unmet=Unmet("package", "g++ is gone"), metrics={})
    made = build([run(entry("a", 101.0), gone, started="2026-11-21"), old])
    assert list(made.rows) == [node("a")]
    assert made.skips == {node("b"): ("package", "g++ is gone")}
