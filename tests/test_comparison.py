"""`compare OLD NEW`: runs and baselines in every combination, lost cases, exit status."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kept_runs
import pytest
from kept_runs import record

from lowbit import baselines, comparison, runs
from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.record import Record
from lowbit.report.difference import difference


def keep(root: Path, *records: Record, **changes: Any) -> Path:
    return kept_runs.keep(root, *records, end={}, **changes)


def accept(root: Path, *paths: Path) -> Path:
    return baselines.save(baselines.build([runs.read(path) for path in paths]), root)


def test_two_runs_are_judged_by_the_floors(tmp_path: Path) -> None:
    old = keep(tmp_path, record("a", 100.0), record("b", 100.0), environment={"torch": "2.11.0"})
    new = keep(tmp_path, record("a", 99.0), record("b", 97.0), environment={"torch": "2.13.0"})
    result = comparison.compare_runs(old, new / "run.json")
    assert [(case[-2], [v.status for v in verdicts]) for case, verdicts in result.verdicts] == [
        ("a", ["ok"]),
        ("b", ["regression"]),
    ]
    assert result.failed
    assert result.environment == ["torch 2.11.0 -> 2.13.0"]
    assert not comparison.compare_runs(new, old).failed


def test_a_baselines_spread_widens_the_limit(tmp_path: Path) -> None:
    noisy = [keep(tmp_path / "runs", record("a", value)) for value in (94.0, 97.0, 100.0, 103.0, 106.0)]
    old = accept(tmp_path / "baselines", *noisy)
    new = keep(tmp_path / "runs", record("a", 90.0))
    assert not comparison.compare_runs(old, new).failed
    assert comparison.compare_runs(noisy[2], new).failed
    back = comparison.compare_runs(new, old)
    assert [v.status for _, verdicts in back.verdicts for v in verdicts] == ["improvement"]


def test_lost_cases_fail_unless_they_were_left_out(tmp_path: Path) -> None:
    old = keep(tmp_path, record("a", 1.0), record("b", 1.0), record("c", 1.0), record("d", 1.0))
    skipped = record("b", 0, outcome="skipped", unmet=Unmet("package", "needs gemlite"), metrics={})
    failed = record("c", 0, outcome="failed", error="CUDA error", metrics={})
    void = record("d", 0.1, outcome="void")
    new = keep(tmp_path, skipped, failed, void, record("e", 1.0))
    result = comparison.compare_runs(old, new)
    assert result.lost == {
        record("a", 0).case: "not in the new run",
        skipped.case: "skipped: package: needs gemlite",
        failed.case: "failed: CUDA error",
    }
    assert result.void == [void.case]
    assert result.new == [record("e", 0).case]
    assert result.failed
    assert difference(result).splitlines()[-1].endswith("; 1 case void in NEW, not judged")
    selected = keep(tmp_path, record("b", 1.0), selection={"-k": "b"})
    result = comparison.compare_runs(old, selected)
    assert (result.failed, result.left_out) == (False, 3)
    assert "0 failures in 1 case, 1 gated metric; 3 cases of OLD not selected in NEW" in difference(result)
    other = keep(tmp_path, record("e", 1.0), selection={"-k": "e"})
    with pytest.raises(LowbitError, match="no measured case in common: nothing to compare"):
        comparison.compare_runs(old, other)
    disturbed = keep(tmp_path, void, selection={"-k": "d"})
    with pytest.raises(LowbitError, match=r"all 1 cases that it has in common .* are void"):
        comparison.compare_runs(old, disturbed)
    unselected = keep(tmp_path, record("b", 1.0), selection={"-k": ""})
    assert len(comparison.compare_runs(old, unselected).lost) == 3


def test_a_case_that_the_new_baseline_skips_is_lost(tmp_path: Path) -> None:
    old = keep(tmp_path, record("a", 1.0))
    skipped = record("a", 0, outcome="skipped", unmet=Unmet("memory", "needs 20 GiB"), metrics={})
    new = accept(tmp_path / "baselines", keep(tmp_path, skipped))
    assert comparison.compare_runs(old, new).lost == {skipped.case: "skipped: memory: needs 20 GiB"}


def test_not_a_number_never_passes(tmp_path: Path) -> None:
    good, bad = keep(tmp_path, record("a", 1.0)), keep(tmp_path, record("a", float("nan")))
    assert comparison.compare_runs(good, bad).failed
    ((_, verdicts),) = comparison.compare_runs(bad, good).verdicts
    assert [v.status for v in verdicts] == ["new"]


def test_a_cpus_wall_clock_is_not_gated(tmp_path: Path) -> None:
    old, new = (keep(tmp_path, record("a", value), device="cpu-epyc-2c") for value in (100.0, 10.0))
    assert not comparison.compare_runs(old, new).failed


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    old, new = keep(tmp_path, record("a", 1.0)), keep(tmp_path, record("a", 1.0), device="nvidia-a100")
    with pytest.raises(LowbitError, match=r"measured different things.*nvidia-h200.*got nvidia-a100"):
        comparison.compare_runs(old, new)
    plain = tmp_path / "plain.json"
    plain.write_text('{"benchmarks": []}')
    with pytest.raises(LowbitError, match="without lowbit's part"):
        comparison.compare_runs(old, plain)
    with pytest.raises(LowbitError, match="no such lowbit run"):
        comparison.compare_runs(old, tmp_path / "absent.json")


def test_of_a_folder_of_runs_the_newest_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``compare OLD .lowbit/runs``: the run just made, without looking for its name."""
    old = accept(tmp_path / "baselines", keep(tmp_path / "runs", record("a", 100.0)))
    keep(tmp_path / "runs", record("a", 50.0))
    newest = keep(tmp_path / "runs", record("a", 99.0))
    killed = tmp_path / "runs" / "99991231T000000.000000Z-1-0" / "journal.jsonl"
    killed.parent.mkdir()
    killed.touch()
    found = comparison.read(tmp_path / "runs")
    assert found.path == newest
    assert capsys.readouterr().err.startswith(f"lowbit: left out: {killed}: ")
    assert not comparison.compare_runs(old, tmp_path / "runs").failed
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowbitError, match="empty: expected a kept run, a baseline or a folder of kept runs, got none"):
        comparison.compare_runs(old, tmp_path / "empty")


def test_small_changes_and_small_figures_keep_their_digits(tmp_path: Path) -> None:
    """A perplexity fails by 0.1 %, a CPU's ratio is a few percent of 1: two decimals would show neither."""
    old, new = (
        keep(
            tmp_path,
            record("a", metrics={"ppl_embedded_512": ppl}),
            record("b", metrics={"speed_ratio": ratio}),
            device="cpu-x",
        )
        for ppl, ratio in ((2.1467, 0.0617), (2.1477, 0.0602))
    )
    text = difference(comparison.compare_runs(old, new))
    assert re.search(r"decode\[a\] +ppl +2\.147 +2\.148 +\+0\.05% +ok", text), text
    worse = difference(comparison.compare_runs(new, old))
    assert "speed_ratio" not in worse  # no headline, and within its limit
    slow = keep(tmp_path, record("b", metrics={"speed_ratio": 0.0402}), device="cpu-x", selection={"-k": "b"})
    text = difference(comparison.compare_runs(old, slow))
    assert re.search(r"decode\[b\] +speed_ratio +0\.06170 +0\.04020 +-34\.8% +REGRESSED", text), text


def compiled(seconds: float, anew: float | None) -> Record:
    return record(metrics={"compile_s": seconds} | ({} if anew is None else {"compiled_anew": anew}))


@pytest.mark.parametrize(
    ("old", "new", "judged"),
    [
        (compiled(5.0, 0.0), compiled(40.0, 3.0), False),
        (compiled(5.0, None), compiled(40.0, 3.0), False),  # an older lowbit's
        (compiled(5.0, 0.0), compiled(40.0, 0.0), True),
        (compiled(5.0, 3.0), compiled(40.0, 3.0), True),
        (compiled(5.0, 1.0), compiled(160.0, 33.0), True),  # a compile per layer
        (compiled(5.0, None), compiled(40.0, None), True),
    ],
)
def test_a_cold_cache_is_no_slower_compiler(tmp_path: Path, old: Record, new: Record, judged: bool) -> None:
    found = comparison.compare_runs(keep(tmp_path, old), keep(tmp_path, new))
    assert found.failed is judged
    assert found.cold == ([] if judged else [new.case])
    told = "; compile_s of 1 case not judged: NEW's cache of compiled graphs was cold"
    assert (told in difference(found)) is not judged


def test_a_cold_cache_excuses_nothing_but_its_seconds(tmp_path: Path) -> None:
    old = keep(tmp_path, record(metrics={"compile_s": 5.0, "decode_tok_s": 100.0, "compiled_anew": 0.0}))
    slow = keep(tmp_path, record(metrics={"compile_s": 40.0, "decode_tok_s": 90.0, "compiled_anew": 1.0}))
    lost = keep(tmp_path, record(metrics={"decode_tok_s": 100.0, "compiled_anew": 1.0}))
    for new, metric in ((slow, "decode_tok_s"), (lost, "compile_s")):
        ((_, verdicts),) = comparison.compare_runs(old, new).verdicts
        assert [verdict.metric for verdict in verdicts if verdict.fails] == [metric]
