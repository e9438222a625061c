"""The command line: what it prints, and the exit code that a script goes by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit import __version__, runs
from lowbit.__main__ import main
from lowbit.formats import FORMATS
from lowbit.record import Record

CASE = "benches/test_decode.py::test_decode[{format}-default-b1_c0]"


@pytest.fixture
def kept_run(tmp_path):
    """A function that keeps a run of one GPU's decode speeds: ``kept_run("old", **{"bf16-torch": 59.8})``."""

    def keep(name, device="nvidia-h200", **decode_tok_s):
        header = runs.Header(device, "NVIDIA H200", "llama-3.1-8b", "dummy", "embedded_512", "quick", {"torch": name})
        with runs.start(tmp_path / name, header) as writer:
            for fmt, value in decode_tok_s.items():
                case = CASE.format(format=fmt)
                record = Record(case, "decode", fmt, "default", "b1_c0", "llama-3.1-8b", "dummy", "bf16")
                record.metrics["decode_tok_s"] = value
                writer.append(record, None)
            return writer.close(0)

    return keep


OLD = {"bf16-torch": 180.0, "a16w4_g128-torchao": 268.7}


def compare(capsys, old, new):
    code = main(["compare", str(old), str(new)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_compare_passes_what_moved_within_its_limit(kept_run, capsys):
    code, out, _ = compare(capsys, kept_run("old", **OLD), kept_run("new", **{**OLD, "bf16-torch": 179.0}))
    assert code == 0
    assert "0 failures in 2 cases" in out
    assert "environment: torch old -> new" in out


def test_compare_fails_a_slowdown_by_name_and_puts_it_first(kept_run, capsys):
    new = kept_run("new", **{**OLD, "a16w4_g128-torchao": 241.0})
    code, out, _ = compare(capsys, kept_run("old", **OLD), new)
    assert code == 1
    first = out.splitlines()[1].split()
    assert first == [
        "decode[a16w4_g128-torchao-default-b1_c0]",
        "decode_tok_s",
        "268.7",
        "241.0",
        "-10.3%",
        "REGRESSED",
    ]
    assert "on nvidia-h200: decode_tok_s 268.7 -> 241.0 tok/s (-10.3 %, limit 2.0 %)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 100


def test_compare_fails_a_case_that_was_lost(kept_run, capsys):
    code, out, _ = compare(capsys, kept_run("old", **OLD), kept_run("new", **{"bf16-torch": 180.0}))
    assert code == 1
    assert "decode[a16w4_g128-torchao-default-b1_c0]: lost" in " ".join(out.split())


def test_compare_reports_a_new_case_and_an_improvement_without_failing(kept_run, capsys):
    code, out, _ = compare(
        capsys, kept_run("old", **{"bf16-torch": 180.0}), kept_run("new", **{**OLD, "bf16-torch": 190.0})
    )
    assert code == 0
    words = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith("decode[")}
    assert words == {"decode[bf16-torch-default-b1_c0]": "better", "decode[a16w4_g128-torchao-default-b1_c0]": "new"}


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"benchmarks": []}'])
def test_compare_with_an_unusable_file_is_one_line_and_exit_code_2(kept_run, capsys, tmp_path, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    code, out, err = compare(capsys, path, kept_run("new", **OLD))
    assert code == 2
    assert not out
    assert err.startswith(f"lowbit: error: {path}: ")
    assert len(err.splitlines()) == 1


def test_compare_refuses_another_device(kept_run, capsys):
    code, _, err = compare(capsys, kept_run("old", **OLD), kept_run("new", device="nvidia-a100", **OLD))
    assert code == 2
    assert "nvidia-h200" in err
    assert "nvidia-a100" in err


def test_compare_refuses_runs_without_a_case_in_common(kept_run, capsys):
    code, _, err = compare(capsys, kept_run("old", **{"bf16-torch": 180.0}), kept_run("new", **{"fp16-torch": 1.0}))
    assert code == 1  # what NEW was free to measure and did not is lost
    empty = kept_run("empty")
    code, out, err = compare(capsys, empty, kept_run("other", **OLD))
    assert (code, out) == (2, "")
    assert "no measured case in common: nothing to compare" in err


def test_formats_lists_every_row_as_running_or_with_its_reason(capsys):
    assert main(["formats", "--model", "embedded"]) == 0
    out = capsys.readouterr().out
    for name in FORMATS:
        assert name in out
    assert max(map(len, out.splitlines())) <= 100
    flat = " ".join(out.split())
    assert main(["formats", "--model", "embedded", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(FORMATS)
    for name, row in rows.items():
        assert row["runs"] == (row["reason"] is None)
        if not row["runs"]:
            assert f"{row['kind']}: {row['reason']}" in flat, name
    assert rows["bf16-torch"]["runs"]
    assert "W4A16" in rows["a16w4_g128-torchao"]["selectors"]


def test_models_gives_the_true_sizes_and_says_what_auto_takes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("LOWBIT_MODEL", raising=False)
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["llama-3.1-8b"]["parameters"] == 8_030_261_248
    assert rows["llama-3.1-8b"]["weights"].endswith("not cached")
    assert rows["embedded"]["weights"] == "in the package"
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248" in out
    assert "auto takes" in out


def test_without_a_command_the_overview_is_printed(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: lowbit" in captured.err
    assert "what runs here, what doesn't, and why" in captured.err


def test_a_commands_help_begins_with_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "judge NEW by OLD" in capsys.readouterr().out.partition("OLD NEW")[2]


@pytest.mark.parametrize("arguments", [["nonsense"], ["compare", "one"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: lowbit" in capsys.readouterr().err


def test_an_unknown_model_is_one_line_that_lists_the_known_ones(capsys):
    assert main(["formats", "--model", "llama-9"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "llama-3.1-8b" in err


def test_the_module_runs_and_help_and_compare_need_no_torch(kept_run):
    old = kept_run("old", **OLD)
    code = (
        "import sys\n"
        "from lowbit.__main__ import main\n"
        f"assert main(['compare', {str(old)!r}, {str(old)!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    version = subprocess.run([sys.executable, "-m", "lowbit", "--version"], check=True, capture_output=True, text=True)
    assert version.stdout == f"lowbit {__version__}\n"


def test_ctrl_c_is_one_line(kept_run, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.comparison.compare_runs", interrupt)
    assert compare(capsys, *[kept_run("old", **OLD)] * 2) == (130, "", "lowbit: interrupted\n")


def test_a_reader_that_stops_early_is_no_error(kept_run):
    old = kept_run("old", **OLD)
    command = f"{sys.executable} -m lowbit compare {old} {old} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_stops_early_does_not_hide_that_new_is_worse(kept_run):
    old, new = kept_run("old", **OLD), kept_run("new", **{**OLD, "a16w4_g128-torchao": 241.0})
    command = f"{sys.executable} -m lowbit compare {old} {new} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["compare OLD OLD", "--help", "--version", "plan --help"])
def test_a_full_disk_is_one_line_and_exit_code_1(kept_run, command, buffered):
    old = str(kept_run("old", **OLD))
    words = [old if word == "OLD" else word for word in command.split()]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "lowbit", *words],
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == (
        "lowbit: error: standard output can't be written ([Errno 28] No space left on device), so what is there is not "
        "whole; free space, or send it elsewhere\n"
    )


def test_an_error_of_another_file_is_not_taken_for_one_of_the_output(kept_run, monkeypatch):
    def break_off(*args, **options):
        raise OSError(28, "No space left on device", "elsewhere")

    monkeypatch.setattr("lowbit.comparison.compare_runs", break_off)
    with pytest.raises(OSError, match="elsewhere"):
        main(["compare", *[str(kept_run("old", **OLD))] * 2])
