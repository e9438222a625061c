"""History: which runs count as nights, in which order, and what a folder of anything else does."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest

from lowbit import digest, history, merge, runs
from lowbit.errors import LowbitError
from lowbit.record import Record

CASE = "benches/test_decode.py::test_decode[bf16-torch-eager-b1_c0]"


@pytest.fixture
def keep(tmp_path):
    """A function that keeps a run: ``keep(day, value)``; returns its folder."""

    def keep(day, value, device="nvidia-h200", outcome="measured", root=tmp_path / "runs", **fields):
        header = runs.Header(
            *(device, device.upper(), fields.pop("model", "llama-3.1-8b"), "dummy", "embedded_512", "quick"),
            environment=fields.pop("environment", {"torch": "2.11.0"}),
            started=f"2026-11-{day:02}T03:00:00+00:00",
            **fields,
        )
        with runs.start(root, header) as writer:
            record = Record(CASE, "decode", "bf16-torch", "eager", "b1_c0", header.model, "dummy", outcome=outcome)
            record.metrics = {"decode_tok_s": value}
            writer.append(record, None)
            return writer.close(0).parent

    return keep


def test_nights_are_in_order_of_their_start_whatever_the_folder_says(keep, tmp_path):
    keep(3, 103.0)
    keep(1, 101.0)
    keep(2, 102.0)
    (found,) = history.read(tmp_path / "runs").found
    assert (found.device, found.device_name, found.model) == ("nvidia-h200", "NVIDIA-H200", "llama-3.1-8b")
    assert [night.date for night in found.nights] == ["2026-11-01", "2026-11-02", "2026-11-03"]
    assert found.series(CASE, "decode_tok_s") == [101.0, 102.0, 103.0]
    assert found.cases() == {CASE: ["decode_tok_s"]}
    assert found.nights[0].environment == {"torch": "2.11.0"}


def test_devices_and_models_are_histories_of_their_own_and_can_be_chosen(keep, tmp_path):
    keep(1, 101.0)
    keep(2, 102.0)
    keep(1, 50.0, device="nvidia-a100")
    keep(1, 70.0, model="llama-3.2-1b")
    root = tmp_path / "runs"
    assert [len(found.nights) for found in history.read(root).found] == [2, 1, 1]
    (found,) = history.read(root, device="nvidia-a100").found
    assert found.series(CASE, "decode_tok_s") == [50.0]
    (found,) = history.read(root, model="llama-3.2-1b").found
    assert found.series(CASE, "decode_tok_s") == [70.0]
    with pytest.raises(LowbitError, match="expected on b200, got llama-3"):
        history.read(root, device="b200")


@pytest.mark.parametrize("outcome", ["void", "failed", "skipped"])
def test_what_was_not_measured_is_a_gap(keep, tmp_path, outcome):
    keep(1, 101.0)
    keep(2, 102.0, outcome=outcome)
    keep(3, math.nan)
    keep(4, 104.0)
    (found,) = history.read(tmp_path / "runs").found
    values = found.series(CASE, "decode_tok_s")
    assert [value for value in values if not math.isnan(value)] == [101.0, 104.0]
    assert math.isnan(found.series("another case", "decode_tok_s")[0])


def test_a_run_under_cuda_launch_blocking_is_no_night(keep, tmp_path):
    keep(1, 101.0)
    keep(2, 10.0, environment={"torch": "2.11.0", "CUDA_LAUNCH_BLOCKING": "1"})
    (found,) = history.read(tmp_path / "runs").found
    assert found.series(CASE, "decode_tok_s") == [101.0]


def test_documents_and_nested_artefacts_are_read_and_copies_count_once(keep, tmp_path):
    folder = keep(1, 101.0)
    root = tmp_path / "artefacts"
    (root / "a" / "b").mkdir(parents=True)
    shutil.copy(folder / "run.json", root / "night-1.json")
    shutil.copytree(folder, root / "a" / "b" / folder.name)
    shutil.copy(keep(2, 102.0) / "run.json", root / "a" / "other name.json")
    (root / "package.json").write_text('{"name": "no run"}')
    (root / "list.json").write_text("[1, 2]")
    (root / "baseline.json").write_text(json.dumps({"benchmarks": [], "lowbit": {"schema": 1, "kind": "baseline"}}))
    result = history.read(root)
    assert result.found[0].series(CASE, "decode_tok_s") == [101.0, 102.0]
    assert result.unreadable == []


def test_a_broken_run_costs_itself_and_is_named(keep, tmp_path):
    keep(1, 101.0)
    journal = keep(2, 102.0) / "journal.jsonl"
    journal.write_bytes(b"{broken\n" + journal.read_bytes())
    (tmp_path / "runs" / "cut.json").write_text('{"benchmarks": [')
    result = history.read(tmp_path / "runs")
    assert result.found[0].series(CASE, "decode_tok_s") == [101.0]
    assert len(result.unreadable) == 2
    assert str(journal) in result.unreadable[0]
    assert "cut.json" in result.unreadable[1]


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(LowbitError, match="no such folder of kept runs"):
        history.read(tmp_path / "nowhere")
    with pytest.raises(LowbitError, match="expected any kept run, got no readable run"):
        history.read(tmp_path)


def test_a_single_file_is_a_history(keep, tmp_path):
    folder = keep(1, 101.0)
    (found,) = history.read(folder / "run.json").found
    assert found.series(CASE, "decode_tok_s") == [101.0]


@pytest.fixture
def reads(monkeypatch):
    """The files that are read in full from now on."""
    seen = []
    original = merge.read
    monkeypatch.setattr(merge, "read", lambda path: seen.append(path) or original(path))
    return seen


def test_a_night_is_read_in_full_once(keep, tmp_path, reads):
    journals = [keep(day, 100.0 + day) / "journal.jsonl" for day in (1, 2)]
    root = tmp_path / "runs"
    shutil.copytree(keep(3, 90.0, model="llama-3.2-1b"), tmp_path / "one")
    (tmp_path / "one" / "journal.jsonl").unlink()
    shutil.move(tmp_path / "one" / "run.json", root / "document.json")
    first = history.read(root)
    assert {*journals, root / "document.json"} < set(reads)
    reads.clear()
    assert history.read(root) == first
    assert reads == []
    keep(4, 104.0)
    (found,) = history.read(root, model="llama-3.1-8b").found
    assert found.series(CASE, "decode_tok_s") == [101.0, 102.0, 104.0]
    assert len(reads) == 1


def test_a_run_that_went_on_is_read_anew(keep, tmp_path, reads):
    journal = keep(1, 101.0) / "journal.jsonl"
    history.read(tmp_path / "runs")
    reads.clear()
    header, case, end = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(header + case + end + case.replace(b"101.0", b"99.0"))
    assert history.read(tmp_path / "runs").found[0].series(CASE, "decode_tok_s") == [99.0]
    assert reads == [journal]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"stamp": [1, 2, 3], "rows": []}', None])
def test_a_digest_that_does_not_fit_is_passed_over(keep, tmp_path, reads, content):
    journal = keep(1, 101.0) / "journal.jsonl"
    history.read(tmp_path / "runs")
    if content is None:
        digest.save(journal, digest.stamp(journal), [["nvidia-h200", {"nights": 3}]])
    else:
        digest.path_of(journal).write_bytes(content)
    reads.clear()
    assert history.read(tmp_path / "runs").found[0].series(CASE, "decode_tok_s") == [101.0]
    assert reads == [journal]


def test_a_folder_that_cannot_be_written_is_read_all_the_same(keep, tmp_path, monkeypatch):
    keep(1, 101.0)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    assert history.read(tmp_path / "runs").found[0].series(CASE, "decode_tok_s") == [101.0]
    assert list(tmp_path.rglob("*.digest*")) == []


def test_a_broken_run_has_no_digest(keep, tmp_path):
    journal = keep(1, 101.0) / "journal.jsonl"
    journal.write_bytes(b"{broken\n" + journal.read_bytes())
    for _ in range(2):
        with pytest.raises(LowbitError, match="line 1 is broken"):
            history.read(tmp_path / "runs")
    assert not digest.path_of(journal).exists()
