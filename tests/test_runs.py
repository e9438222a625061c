"""Kept runs: on disk before the next case, readable after a SIGKILL, resumed, matched, and refused with a reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from kept_runs import STATS, header, keep, record

from lowbit import runs
from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.runs import DOCUMENT, JOURNAL


def test_a_run_reads_back_from_folder_journal_and_document(tmp_path: Path) -> None:
    skipped = record("b", outcome="skipped", unmet=Unmet("capability", "needs SM100, this is SM90"), metrics={})
    path = keep(tmp_path, record(samples={"decode_s": [1.0, 1.2]}), skipped, end={"regressed": True}, started="2026")
    for source in (path, path / JOURNAL, path / DOCUMENT):
        run = runs.read(source)
        assert run.header == header(started="2026")
        assert (run.complete, run.regressed, run.exit_status) == (True, True, 0)
        assert run.records() == [record(samples={"decode_s": [1.0, 1.2]}), skipped]
        assert run.entries[skipped.case].stats is None
        assert run.entries[record().case].stats == STATS  # raw samples kept
        assert run.path == path


def test_verdicts_are_kept_beside_their_record_and_the_last_ones_count(tmp_path: Path) -> None:
    with runs.start(tmp_path, header()) as writer:
        first = record("a")
        writer.append(first, None)
        writer.judged(first.case, [{"metric": "decode_tok_s", "status": "regression"}], "0001_x.json of then")
        writer.judged(first.case, [{"metric": "decode_tok_s", "status": "ok"}], "0001_x.json of then")
        writer.append(record("b"), None)
        writer.close(0)
    for path in (writer.path, writer.path / DOCUMENT):
        kept = runs.read(path)
        (judged,) = [found.info["judged"] for found in kept.records() if "judged" in found.info]
        assert judged == {"by": "0001_x.json of then", "verdicts": [{"metric": "decode_tok_s", "status": "ok"}]}


def test_the_document_is_pytest_benchmarks(tmp_path: Path) -> None:
    data = json.loads((keep(tmp_path, record(), end={}) / DOCUMENT).read_text())
    assert set(data) == {"machine_info", "commit_info", "benchmarks", "datetime", "version", "lowbit"}
    (row,) = data["benchmarks"]
    assert set(row) == {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert (row["name"], row["param"], row["group"]) == ("test_decode[a]", "a", "decode b1_c0")
    assert row["extra_info"]["lowbit"]["metrics"] == {"decode_tok_s": 268.7}


def test_cases_leaves_out_what_has_no_result(tmp_path: Path) -> None:
    outcomes = {"a": "measured", "b": "skipped", "c": "failed", "d": "void"}
    path = keep(tmp_path, *(record(case, outcome=outcome) for case, outcome in outcomes.items()), end={})
    assert runs.read(path).cases() == [record("a").case, record("b").case]


def test_not_a_number_is_kept(tmp_path: Path) -> None:
    path = keep(tmp_path, record(metrics={"ppl": float("nan")}), end={})
    for source in (path / JOURNAL, path / DOCUMENT):
        (kept,) = runs.read(source).records()
        assert kept.metrics["ppl"] != kept.metrics["ppl"]


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
from kept_runs import header, record, STATS
from lowbit import runs
writer = runs.start(Path({root!r}), header())
writer.append(record("a"), STATS)
writer.append(record("b"), STATS)
print("kept", flush=True)
time.sleep(60)
"""


def test_finished_cases_survive_sigkill(tmp_path: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"kept\n"
        child.send_signal(signal.SIGKILL)
    run = runs.latest_incomplete(tmp_path, header())
    assert run is not None
    assert run.cases() == [record("a").case, record("b").case]
    assert not run.complete


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = keep(tmp_path, record("a"), record("b"))
    journal = path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-40])
    assert runs.read(path).cases() == [record("a").case]


def test_resume_takes_up_where_it_stopped(tmp_path: Path) -> None:
    path = keep(tmp_path, record("a"), record("b"))
    journal = path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-40])
    with runs.resume(tmp_path, header()) as writer:
        assert writer.path == path
        assert list(writer.entries) == [record("a").case]
        writer.append(record("b"), STATS)
        writer.append(record("c"), STATS)
        writer.close(0)
    run = runs.read(path)
    assert run.complete
    assert run.cases() == [record(case).case for case in "abc"]
    assert runs.read(path / DOCUMENT).cases() == run.cases()


def test_an_interrupted_run_that_was_closed_is_resumed_too(tmp_path: Path) -> None:
    path = keep(tmp_path, record("a"), end={"complete": False})
    with runs.resume(tmp_path, header()) as writer:
        assert not (path / DOCUMENT).exists()  # it no longer is what the run holds
        writer.append(record("b"), STATS)
        assert not runs.read(path).complete


def test_resume_needs_the_same_subject_suite_and_environment(tmp_path: Path) -> None:
    keep(tmp_path, record())
    assert runs.latest_incomplete(tmp_path, header()) is not None
    for change in (
        {"model": "embedded"},
        {"suite": "full"},
        {"environment": {"torch": "2.13.0"}},
        {"protocol": "wikitext2_2048"},
        {"load_format": "auto"},
        {"device": "cpu"},
    ):
        assert runs.latest_incomplete(tmp_path, header(**change)) is None
    with pytest.raises(LowbitError, match=r"--resume: no interrupted run of embedded \(dummy\).*run without --resume"):
        runs.resume(tmp_path, header(model="embedded"))


def test_parts_of_a_sweep_in_one_folder_are_resumed_each_by_its_selection(tmp_path: Path) -> None:
    first = keep(tmp_path, record("a"), selection={"-k": "int4"})
    keep(tmp_path, record("b"), end={}, selection={"-k": "fp8"})
    found = runs.latest_incomplete(tmp_path, header(selection={"-k": "int4"}))
    assert found is not None
    assert found.path == first
    assert runs.latest_incomplete(tmp_path, header(selection={"-k": "fp8"})) is None
    with pytest.raises(LowbitError, match="suite quick, -k 'nf4', in this environment"):
        runs.resume(tmp_path, header(selection={"-k": "nf4"}))


def test_a_finished_run_ends_what_can_be_resumed(tmp_path: Path) -> None:
    keep(tmp_path, record())
    keep(tmp_path, record(), end={})
    assert runs.latest_incomplete(tmp_path, header()) is None


def test_matching_leaves_out_incomplete_runs_other_environments_and_all_before_a_regression(tmp_path: Path) -> None:
    keep(tmp_path, record(), end={})
    keep(tmp_path, record(), end={"regressed": True})
    first = keep(tmp_path, record(), end={})
    keep(tmp_path, record(), end={"complete": False})
    keep(tmp_path, record())
    keep(tmp_path, record(), end={}, environment={"torch": "2.13.0"})
    last = keep(tmp_path, record(), end={})
    assert [run.path for run in runs.matching(tmp_path, header())] == [last, first]
    assert [run.path for run in runs.matching(tmp_path, header(), 1)] == [last]
    assert len(runs.list_runs(tmp_path)) == 7


def test_wall_seconds_are_the_last_known_of_each_case(tmp_path: Path) -> None:
    assert runs.wall_seconds(tmp_path / "none", header()) == {}
    with runs.start(tmp_path, header()) as writer:
        time.sleep(0.05)
        writer.append(record("a"), STATS)
        writer.append(record("b"), STATS)
    seconds = runs.wall_seconds(tmp_path, header(environment={}))
    assert seconds[record("a").case] >= 0.05
    assert seconds[record("b").case] < 0.05
    assert runs.wall_seconds(tmp_path, header(model="embedded")) == {}


def test_wall_seconds_of_workers_are_those_of_the_process_that_measured(tmp_path: Path) -> None:
    """Two cases of 25 s each, side by side, come in one right after the other (as 28.77 s came 0.14 s after 27.81)."""
    with runs.start(tmp_path, header()) as writer:
        for name in ("a", "b"):
            measured = record(name)
            measured.info["wall_s"] = 25.0
            writer.append(measured, STATS)
        writer.append(record("failed"), None)
    seconds = runs.wall_seconds(tmp_path, header())
    assert [seconds[record(name).case] for name in ("a", "b")] == [25.0, 25.0]
    assert seconds[record("failed").case] < 25.0


def test_a_run_without_a_whole_header_does_not_stop_the_others(tmp_path: Path) -> None:
    torn = tmp_path / "20200101T000000Z-1-aa"
    torn.mkdir()
    (torn / JOURNAL).write_text('{"type": "hea')
    path = keep(tmp_path, record(), end={})
    assert [run.path for run in runs.matching(tmp_path, header())] == [path]
    with pytest.raises(LowbitError, match="no whole line"):
        runs.read(torn)


# A disk that refuses, and files that are no runs


def test_a_full_disk_names_the_journal_and_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runs.start(tmp_path, header()) as writer:
        writer.append(record("a"), STATS)
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(writer, "_file", full)
        with pytest.raises(LowbitError, match=r"No space left on device; 1 finished cases are in .*journal.jsonl"):
            writer.append(record("b"), STATS)
    assert runs.read(writer.path).cases() == [record("a").case]


def test_a_full_disk_at_the_end_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runs.start(tmp_path, header()) as writer:
        writer.append(record("a"), STATS)

        def refuse(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(LowbitError, match=r"can't write .*run.json: No space left on device"):
            writer.close(0)
    assert [path.name for path in writer.path.iterdir()] == [JOURNAL]
    assert runs.read(writer.path).cases() == [record("a").case]


def test_a_full_disk_at_the_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(LowbitError, match="No space left"):
        runs.start(tmp_path / "root", header())
    assert runs.list_runs(tmp_path / "root") == []


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowbitError, match=r"can't write .*file/.*Free space or make the folder writable"):
        runs.start(tmp_path / "file", header())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty file"),
        ('{"benchmarks": [', "broken JSON"),
        ("[1, 2]", "no pytest-benchmark document"),
        ('{"benchmarks": []}', "plain pytest-benchmark file"),
        ('{"benchmarks": [], "lowbit": {"schema": 99}}', "expected lowbit schema 1, got 99; upgrade lowbit"),
        ('{"benchmarks": [], "lowbit": {"schema": 1, "kind": "baseline"}}', "got a baseline"),
        ('{"benchmarks": [], "lowbit": {"schema": 1, "kind": "run"}}', "missing or of another shape"),
    ],
)
def test_a_document_that_is_no_run_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(LowbitError, match=complaint) as caught:
        runs.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "line 2 is broken"),
        ('{"a": 1}', "line 2 is no line of a lowbit journal"),
        ('{"type": "case"}', "line 2 lacks 'record'"),
    ],
)
def test_a_broken_line_inside_a_journal_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = keep(tmp_path)
    with (path / JOURNAL).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(LowbitError, match=complaint):
        runs.read(path)


def test_a_header_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.write_text(json.dumps({"type": "header", "schema": 1, **asdict(header()), "colour": "red"}) + "\n")
    with pytest.raises(LowbitError, match="not the header of a lowbit run"):
        runs.read(path)
    with pytest.raises(LowbitError, match="no such lowbit run"):
        runs.read(tmp_path / "absent.json")
