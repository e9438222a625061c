"""merge: one file of many hosts' runs, from which they can be had back, and the conflicts between them."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from nights import DECODE, TORCH, decode, keep, quality

from lowbit import comparison, history, merge, nightly, runs
from lowbit.__main__ import main
from lowbit.errors import LowbitError
from lowbit.formats import Unmet

pytest_plugins = ["pytester"]

BF16, INT4 = DECODE.format(format="bf16-torch"), DECODE.format(format="a16w4_g128-torchao")


def int4(**fields):
    return decode("a16w4_g128-torchao", **fields)


def run(capsys, *arguments):
    code = main(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_parts_of_one_sweep_become_one_kept_run(tmp_path, capsys):
    one = keep(tmp_path / "host-a", [decode(decode_tok_s=180.0)], selection={"-k": "bf16"})
    two = keep(tmp_path / "host-b", [int4(decode_tok_s=268.7)], selection={"-k": "torchao"}, night=1)
    code, out, _ = run(capsys, one, two / "run.json", "-o", tmp_path / "all.json")
    assert code == 0
    assert out.splitlines() == [
        "llama-3.1-8b (dummy) on nvidia-h200: 2 cases",
        f"2 runs merged into {tmp_path / 'all.json'}",
    ]
    merged = runs.read(tmp_path / "all.json")
    assert merged.complete
    assert merged.header.selection == {"-k": "(bf16) or (torchao)"}
    assert {case: entry.record.metrics for case, entry in merged.entries.items()} == {
        BF16: {"decode_tok_s": 180.0},
        INT4: {"decode_tok_s": 268.7},
    }
    assert not comparison.compare_runs(tmp_path / "all.json", tmp_path / "all.json").failed


def test_folders_of_runs_are_searched(tmp_path, capsys):
    for night, record in enumerate([decode(decode_tok_s=180.0), int4(decode_tok_s=268.7)]):
        keep(tmp_path / f"node-{night}" / ".lowbit" / "runs", [record], night=night)
    code, out, _ = run(capsys, tmp_path, "-o", tmp_path / "all.json")
    assert (code, "2 runs merged" in out) == (0, True)


def test_a_note_says_how_the_runs_were_made(tmp_path, capsys):
    skipped = int4(outcome="skipped", unmet=Unmet("package", "no torchao"))
    keep(tmp_path / "runs", [decode(decode_tok_s=180.0), skipped])
    for _ in range(2):  # once in the file, however often it is given
        assert run(capsys, tmp_path / "runs", "-o", tmp_path / "all.json", "--note", "kernels untuned")[0] == 0
        assert run(capsys, tmp_path / "all.json", "-o", tmp_path / "again.json", "--note", "kernels untuned")[0] == 0
    entries = runs.read(tmp_path / "again.json").entries
    assert entries[BF16].record.info["notes"] == ["kernels untuned"]
    assert "notes" not in entries[INT4].record.info


def test_several_devices_are_told_apart_and_can_be_had_back(tmp_path, capsys):
    keep(tmp_path / "runs", [decode(decode_tok_s=180.0)])
    keep(tmp_path / "runs", [decode(decode_tok_s=90.0)], device="nvidia-a100", device_name="NVIDIA A100")
    code, _, _ = run(capsys, tmp_path / "runs", "-o", tmp_path / "all.json")
    assert code == 0
    names = [row["fullname"] for row in json.loads((tmp_path / "all.json").read_text())["benchmarks"]]
    assert sorted(names) == [f"{BF16}@nvidia-a100", f"{BF16}@nvidia-h200"]
    back = {found.header.device: found for found in merge.read(tmp_path / "all.json")}
    assert back["nvidia-a100"].entries[BF16].record.metrics == {"decode_tok_s": 90.0}
    assert back["nvidia-h200"].entries[BF16].record.metrics == {"decode_tok_s": 180.0}
    (tmp_path / "history").mkdir()
    (tmp_path / "all.json").rename(tmp_path / "history" / "all.json")
    assert {found.device for found in history.read(tmp_path / "history").found} == {"nvidia-a100", "nvidia-h200"}
    again, _, _ = run(capsys, tmp_path / "history", "-o", tmp_path / "again.json")  # a merge of a merge
    assert again == 0
    assert len(merge.read(tmp_path / "again.json")) == 2


def test_a_case_measured_twice_is_a_conflict_and_the_later_stays(tmp_path, capsys):
    one = keep(tmp_path / "a", [decode(decode_tok_s=180.0)])
    two = keep(tmp_path / "b", [decode(decode_tok_s=179.0)], night=1)
    code, out, _ = run(capsys, two, one, "-o", tmp_path / "all.json")
    assert code == 1
    assert (
        f"conflict: {BF16}: measured (decode_tok_s 180) in {one}, measured (decode_tok_s 179) in {two}; "
        f"kept: that of {two}"
    ) in out
    assert runs.read(tmp_path / "all.json").entries[BF16].record.metrics["decode_tok_s"] == 179.0


def test_a_conflict_tells_what_one_asks_for_first(tmp_path):
    """Not the first metric of the record: the bytes of the weights are the same in both."""
    parts = [
        keep(tmp_path / str(night), [quality(weights_mib=8.0, ppl_embedded_512=ppl)], night=night)
        for night, ppl in enumerate((2.1467, 2.15))
    ]
    (conflict,) = merge.merge([runs.read(path) for path in parts]).conflicts
    assert "measured (ppl_embedded_512 2.147) in " in conflict
    assert "measured (ppl_embedded_512 2.15) in " in conflict


@pytest.mark.parametrize("outcome", ["failed", "void", "skipped"])
def test_a_measurement_stays_before_anything_else(tmp_path, outcome):
    one = keep(tmp_path / "a", [decode(decode_tok_s=180.0)])
    two = keep(tmp_path / "b", [decode(outcome=outcome)], night=1)
    merged = merge.merge([runs.read(one), runs.read(two)])
    assert merged.runs[0].entries[BF16].record.outcome == "measured"
    assert len(merged.conflicts) == 1
    assert outcome in merged.conflicts[0]


def test_the_same_skip_on_two_hosts_is_no_conflict(tmp_path):
    paths = []
    for night, reason in enumerate(["needs SM100", "needs SM100", "needs cuda"]):
        record = decode(outcome="skipped")
        record.unmet = Unmet("capability", reason)
        paths.append(keep(tmp_path / "runs", [record], night=night))
    assert merge.merge([runs.read(path) for path in paths[:2]]).conflicts == []
    assert len(merge.merge([runs.read(path) for path in paths]).conflicts) == 1


def test_two_environments_of_one_device_are_a_conflict_and_stay_apart(tmp_path, capsys):
    keep(tmp_path / "a", [decode(decode_tok_s=180.0), int4(decode_tok_s=268.0)])
    keep(tmp_path / "b", [decode(decode_tok_s=185.0)], night=1, environment={**TORCH, "torch": "2.13.0"})
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "all.json")
    assert code == 1
    assert "on nvidia-h200 was measured in two environments" in out
    assert "torch 2.11.0 -> 2.13.0; 1 case in both" in out
    document = json.loads((tmp_path / "all.json").read_text())
    assert document["machine_info"]["torch"] == "differs"
    assert document["machine_info"]["torchao"] == "0.18.0"
    assert {row["fullname"].partition("@")[2] for row in document["benchmarks"]} == {"#1", "#2"}
    assert len(document["lowbit"]["conflicts"]) == 1


def test_an_unfinished_or_regressed_part_marks_the_whole(tmp_path):
    whole = keep(tmp_path / "a", [decode(decode_tok_s=180.0)])
    with runs.start(tmp_path / "b", runs.read(whole).header) as writer:
        writer.append(int4(decode_tok_s=268.7), None)
        cut = writer.path  # killed: no end line
    merged = merge.merge([runs.read(whole), runs.read(cut)])
    assert not merged.runs[0].complete
    assert set(merged.runs[0].entries) == {BF16, INT4}


def test_pytest_benchmark_reads_the_file(tmp_path, capsys, pytester):
    keep(tmp_path / "runs", [decode(decode_tok_s=180.0)])
    keep(tmp_path / "runs", [decode(decode_tok_s=90.0)], device="nvidia-a100")
    run(capsys, tmp_path / "runs", "-o", tmp_path / "0001_all.json")
    document = json.loads((tmp_path / "0001_all.json").read_text())
    for row in document["benchmarks"]:  # the fakes time nothing
        row["stats"] |= dict.fromkeys(("min", "max", "mean", "stddev", "iqr", "ops", "outliers", "iterations"), 1)
    (tmp_path / "0001_all.json").write_text(json.dumps(document))
    result = pytester.run(sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "0001_all.json"))
    assert result.ret == 0
    assert "@nvidia-a100" in result.stdout.str()


def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    for path in ("missing", "empty", "broken.json"):
        code, _, err = run(capsys, tmp_path / path, "-o", tmp_path / "all.json")
        assert (code, len(err.splitlines())) == (2, 1)
        assert str(tmp_path / path) in err
    assert not (tmp_path / "all.json").exists()
    with pytest.raises(LowbitError, match="at least one kept run"):
        merge.merge([])


def test_the_same_run_twice_is_no_conflict(tmp_path, capsys):
    one = keep(tmp_path / "a", [decode(decode_tok_s=180.0), int4(outcome="failed")])
    shutil.copytree(one, tmp_path / "copy")
    shutil.copy(one / "run.json", tmp_path / "night.json")
    code, out, _ = run(
        capsys, one, one / "run.json", tmp_path / "copy", tmp_path / "night.json", "-o", tmp_path / "all.json"
    )
    assert (code, "conflict" in out) == (0, False)
    again, _, _ = run(capsys, tmp_path / "all.json", one, "-o", tmp_path / "again.json")
    assert again == 0
    assert runs.read(tmp_path / "again.json").records() == runs.read(one).records()


def test_a_conflict_names_the_files_that_it_is_between(tmp_path, capsys):
    for night, value in enumerate((180.0, 179.0)):
        folder = keep(tmp_path / "runs", [decode(decode_tok_s=value)], night=night)
        shutil.copy(folder / "run.json", tmp_path / f"{night}.json")
    code, out, _ = run(capsys, tmp_path / "0.json", tmp_path / "1.json", "-o", tmp_path / "all.json")
    assert code == 1
    assert f"180) in {tmp_path / '0.json'}, measured (decode_tok_s 179) in {tmp_path / '1.json'}; kept: that of " in out


def test_of_many_conflicts_some_are_printed_and_all_are_in_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nightly, "SHOWN", 1)
    for night in range(2):
        keep(tmp_path / "runs", [decode(decode_tok_s=180.0 + night), int4(decode_tok_s=268.0 + night)], night=night)
    code, out, _ = run(capsys, tmp_path / "runs", "-o", tmp_path / "all.json")
    assert (code, out.count("conflict: ")) == (1, 1)
    assert f"and 1 more conflict, named in {tmp_path / 'all.json'} (lowbit.conflicts)" in out
    document = json.loads((tmp_path / "all.json").read_text())
    assert [BF16 in document["lowbit"]["conflicts"][0], len(document["lowbit"]["conflicts"])] == [True, 2]
    assert runs.read(tmp_path / "all.json").entries[BF16].record.metrics["decode_tok_s"] == 181.0


def test_a_merge_of_two_environments_is_no_run_and_says_why(tmp_path, capsys):
    keep(tmp_path / "a", [decode(decode_tok_s=180.0)])
    keep(tmp_path / "b", [decode(decode_tok_s=185.0)], night=1, environment={**TORCH, "torch": "2.13.0"})
    run(capsys, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "all.json")
    with pytest.raises(LowbitError, match=r"a merge of 2 .*they differ in model, protocol or environment"):
        runs.read(tmp_path / "all.json")


def test_a_device_is_taken_out_of_a_merge(tmp_path, capsys):
    keep(tmp_path / "runs", [decode(decode_tok_s=180.0)])
    keep(tmp_path / "runs", [decode(decode_tok_s=90.0)], device="nvidia-a100")
    run(capsys, tmp_path / "runs", "-o", tmp_path / "all.json")
    with pytest.raises(LowbitError, match=r"a merge of 2 .*python -m lowbit merge .* --device nvidia-h200"):
        comparison.read(tmp_path / "all.json")
    code, out, _ = run(capsys, tmp_path / "all.json", "--device", "nvidia-a100", "-o", tmp_path / "a100.json")
    assert (code, out.splitlines()[0]) == (0, "llama-3.1-8b (dummy) on nvidia-a100: 1 case")
    assert comparison.read(tmp_path / "a100.json").header.device == "nvidia-a100"
    code, _, err = run(capsys, tmp_path / "all.json", "--device", "b200", "-o", tmp_path / "b200.json")
    assert (code, "expected kept runs on b200, got nvidia-" in err) == (2, True)


def test_a_broken_run_of_a_folder_is_left_out_and_one_that_was_named_is_refused(tmp_path, capsys):
    keep(tmp_path / "runs", [decode(decode_tok_s=180.0)])
    broken = tmp_path / "runs" / "broken" / "journal.jsonl"
    broken.parent.mkdir()
    broken.write_text("{\n")
    code, out, err = run(capsys, tmp_path / "runs", "-o", tmp_path / "all.json")
    assert (code, "1 run merged" in out, str(broken) in err) == (1, True, True)
    assert run(capsys, tmp_path / "runs", broken, "-o", tmp_path / "all.json")[0] == 2
    assert run(capsys, broken.parent, "-o", tmp_path / "all.json")[0] == 2


def test_the_larger_suite_is_the_merges(tmp_path):
    paths = [
        keep(tmp_path, [int4(decode_tok_s=1.0)], suite="nightly"),
        keep(tmp_path, [decode(decode_tok_s=1.0)], night=1),
    ]
    assert merge.merge([runs.read(path) for path in paths]).runs[0].header.suite == "nightly"
