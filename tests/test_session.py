"""What goes wrong in a run, and that nothing is lost by it: errors, faults, disturbances, full disks, Ctrl-C, kills."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from fakes import CASES, DECODE, Bench
from toy_benches import GUARD_S

from lowbit import hub, quality
from lowbit.faults import is_device_fault, is_out_of_memory, own_frames

pytest_plugins = ["pytester"]


def outcomes(bench: Bench) -> dict[str, str]:
    """Of the newest kept run, by test name."""
    records = [line["record"] for line in bench.journal() if line["type"] == "case"]
    return {record["case"].rpartition("::")[2]: record["outcome"] for record in records}


# -- one case ----------------------------------------------------------------------------------------------------------


def test_what_the_user_can_mend_fails_its_case_in_one_line(bench):
    bench.plan(error=f"decode[{DECODE}]")
    result = bench.run()
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert f"decode[{DECODE}] on fake-gpu: NaN or Inf logits from decode[" in result.stdout.str()
    assert "During handling of the above exception" not in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
    assert "fakes.py" not in result.stdout.str()
    assert outcomes(bench)[f"test_decode[{DECODE}]"] == "failed"


def test_a_model_that_does_not_load_ends_the_run_with_one_error(bench):
    bench.plan(load="bf16-torch")
    result = bench.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (result.stdout.str() + result.stderr.str()).count("Exit: model.safetensors is truncated") == 1
    assert list(outcomes(bench).values()) == ["failed"]
    assert "recommendation" not in result.stdout.str()
    assert "accept this machine's figures" not in result.stdout.str()


@pytest.mark.parametrize("args", [(), ("--isolate",), ("-n", "1")], ids=["here", "in a child", "in a worker"])
def test_a_model_that_does_not_load_is_told_once_with_its_ways_out(bench, args):
    """It was told by pytest and in the summary, and by children and workers twice in every case."""
    why = f"--model org/gated: the model is gated. {hub._WAYS_OUT}"
    bench.plan(**{"load": "", "why": why, "real children": True})
    result = bench.run(*args, processes=bool(args))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = " ".join((result.stdout.str() + result.stderr.str()).split())
    assert told.count(why) == 1
    assert [told.count(words) for words in ("org/gated", "Three ways out", "(1)", "(2)", "(3)")] == [1] * 5
    assert list(outcomes(bench).values()) == ["failed"]


def test_a_librarys_own_error_keeps_its_traceback_and_leaves_a_failed_record(bench):
    bench.plan(bug=f"decode[{DECODE}]")
    result = bench.run("--benchmark-json=out.json")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert 'raise ValueError("a library\'s own error")' in result.stdout.str()
    record = next(line["record"] for line in bench.journal() if line.get("record", {}).get("outcome") == "failed")
    assert (record["error"], record["format"]) == ("ValueError: a library's own error", "a16w4_g128-torchao")
    assert record["case"] == f"benches/test_decode.py::test_decode[{DECODE}]"


def test_out_of_memory_costs_its_own_case_and_says_what_to_do(bench):
    bench.plan(memory=f"decode[{DECODE}]")
    result = bench.run()
    result.assert_outcomes(passed=CASES - 1, failed=1)
    expected = "out of memory on Fake GPU: CUDA out of memory. Tried to allocate 2.00 GiB.; free it of other processes"
    assert expected in result.stdout.str()
    assert "fakes.py" not in result.stdout.str()
    assert bench.children == []


@pytest.mark.parametrize("kind", ["memory", "bug", "error"])
def test_a_kept_failure_says_where_in_lowbit_it_was(bench, kind):
    """An out-of-memory of the night had its bytes alone in the journal, and no line that asked for them."""
    bench.plan(**{kind: f"decode[{DECODE}]"})
    bench.run("-k", f"test_decode[{DECODE}]")
    (record,) = (line["record"] for line in bench.journal() if line["type"] == "case")
    assert record["outcome"] == "failed"
    if kind == "error":  # lowbit's own, which says what is wrong
        assert "raised_in" not in record["info"]
        return
    (line,) = record["info"]["raised_in"]
    assert re.fullmatch(r"lowbit/pytest_plugin/measurement\.py:\d+ obtain: record = bench\.lab\.measure\(.*", line)


def test_the_last_lines_of_lowbit_alone_are_kept():
    with pytest.raises((TypeError, AttributeError)) as caught:
        quality.divergence(None, None)
    assert [re.sub(r":\d+ ", " ", line) for line in own_frames(caught.value)] == [
        "lowbit/quality.py divergence: p, q = F.log_softmax(base, dim=-1), F.log_softmax(other, dim=-1)"
    ]


def test_after_a_cuda_fault_the_rest_runs_in_fresh_processes(bench):
    bench.plan(fault="prefill[bf16-torch-eager")
    result = bench.run()
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert len(bench.children) == CASES - 2  # all but the quality case before it and the faulting one
    assert len(outcomes(bench)) == CASES


def test_isolate_measures_every_case_in_a_fresh_process(bench):
    bench.run("--isolate").assert_outcomes(passed=CASES)
    assert len(bench.children) == CASES


def test_isolate_reports_a_failure_of_the_fresh_process(bench):
    bench.plan(error=f"decode[{DECODE}]")
    result = bench.run("--isolate")
    result.assert_outcomes(passed=CASES - 1, failed=1)
    assert outcomes(bench)[f"test_decode[{DECODE}]"] == "failed"


def test_a_fresh_process_that_is_killed_fails_its_case(bench):
    bench.plan(**{"kill": f"decode[{DECODE}]", "real children": True})
    result = bench.run("--isolate", "-k", f"test_decode[{DECODE}]", processes=True)
    result.assert_outcomes(failed=1, deselected=CASES - 1)
    assert f"test_decode[{DECODE}]: its fresh process was killed by SIGKILL" in result.stdout.str()
    assert outcomes(bench) == {f"test_decode[{DECODE}]": "failed"}


def test_a_disturbed_case_is_repeated_once_then_void_and_never_regresses(bench):
    bench.accept()
    bench.plan(void=f"decode[{DECODE}]", tok_s={f"decode[{DECODE}]": 50})
    result = bench.run("--benchmark-compare", "-rs")
    result.assert_outcomes(passed=CASES - 1, skipped=1)
    assert len(bench.children) == 1
    assert "void, measured twice: thermal slowdown" in result.stdout.str()
    assert bench.journal()[-1]["regressed"] is False


def test_a_child_measures_a_disturbed_case_once(bench):
    bench.plan(void=f"decode[{DECODE}]")
    node = f"benches/test_decode.py::test_decode[{DECODE}]"
    bench.run("--lowbit-child=result.json", paths=(node,))
    assert json.loads((bench.root / "result.json").read_text())["record"]["outcome"] == "void"
    assert bench.children == []
    assert bench.runs() == []


@pytest.mark.parametrize(
    ("error", "fault", "memory"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
        (RuntimeError("CUDA driver error: device-side assert triggered"), True, False),
        (torch.OutOfMemoryError("CUDA error: out of memory"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), False, True),
        (ValueError("shape"), False, False),
    ],
)
def test_faults_are_told_from_want_of_memory(error, fault, memory):
    assert (is_device_fault(error), is_out_of_memory(error)) == (fault, memory)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_an_unwritable_folder_is_a_usage_error_before_anything_is_measured(bench):
    (bench.root / ".lowbit").write_text("a file in the folder's place")
    result = bench.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "can't write" in result.stderr.str()
    assert "the run could not be started" in result.stderr.str()


def test_a_full_disk_ends_the_run_and_what_was_kept_can_be_resumed(bench):
    write, lines = os.write, 0

    def fill_up(descriptor, data):
        nonlocal lines
        lines += 1
        if lines == 5:  # header and three cases fit, half of the fourth
            write(descriptor, data[: len(data) // 2])
        if lines >= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with bench.monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        result = bench.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "No space left on device; 3 finished cases are in" in result.stdout.str()
    result = bench.run("--resume")
    result.assert_outcomes(passed=CASES)
    assert list(outcomes(bench).values()) == ["measured"] * CASES
    assert len(bench.runs()) == 1


# -- interruptions and --resume ----------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_finished_and_resume_continues(bench):
    bench.plan(interrupt="decode[bf16-torch-eager")
    result = bench.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert "run kept in" in result.stdout.str()
    assert f"it has 2 of {CASES} cases; the rest: the same command with --resume" in result.stdout.str()
    assert "--update-baselines" not in result.stdout.str()
    (run,) = bench.runs()
    assert [line["type"] for line in bench.journal()] == ["header", "case", "case", "end"]
    bench.plan(tok_s={"prefill": 1})
    result = bench.run("--resume", "--benchmark-json=out.json")
    result.assert_outcomes(passed=CASES)
    assert bench.runs() == [run]
    assert [line["type"] for line in bench.journal()].count("case") == CASES
    assert len(json.loads((bench.root / "out.json").read_text())["benchmarks"]) == CASES
    assert bench.run("--resume").ret == pytest.ExitCode.USAGE_ERROR


def test_a_real_ctrl_c_exits_with_2_and_leaves_no_process_and_no_temporary_file(bench):
    """SIGINT to the parent while a case of --isolate is measured in its fresh process."""
    bench.plan(**{"sleep": "decode[bf16-torch-eager", "real children": True})
    temporary = bench.root / "temporary"
    temporary.mkdir()
    asleep = bench.root / "asleep"
    deadline = time.monotonic() + GUARD_S
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "benches", "-p", "fakes", "--isolate", "-k", "bf16 and eager and decode"],
        cwd=bench.root,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not asleep.exists():
                assert time.monotonic() < deadline, "the case was never reached"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=GUARD_S)
        finally:
            process.kill()
    assert process.returncode == 2, output
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(asleep.read_text()), 0)
    assert bench.journal()[-1] | {"finished": ""} == {
        "type": "end",
        "exit_status": 2,
        "complete": False,
        "regressed": False,
        "finished": "",
    }


def test_a_killed_process_is_continued_with_resume(bench):
    bench.plan(kill="decode[a16w4_g128-torchao-eager")
    assert bench.run(processes=True).ret == -signal.SIGKILL
    before = bench.journal()
    assert [line["type"] for line in before] == ["header", *["case"] * 7]
    bench.plan(tok_s={"bf16": 1})  # would show if it was measured again
    bench.run("--resume").assert_outcomes(passed=CASES)
    assert len(bench.runs()) == 1
    assert bench.journal()[: len(before)] == before
    assert [line["type"] for line in bench.journal()].count("case") == CASES
    assert bench.journal()[-1]["complete"] is True


def test_resume_without_an_interrupted_run_says_so(bench):
    result = bench.run("--resume")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--resume: no interrupted run of embedded (auto), suite quick" in result.stderr.str()
    assert bench.runs() == []


@pytest.mark.parametrize(
    ("text", "fault", "memory"),
    [
        ("CUDA error: an illegal memory access was encountered", True, False),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True, False),
        ("CUDA error: out of memory", False, True),
        ("Triton Error [CUDA]: out of memory", False, True),
        ("mat1 and mat2 shapes cannot be multiplied", False, False),
    ],
)
def test_what_poisons_the_process(text, fault, memory):
    assert is_device_fault(RuntimeError(text)) is fault
    assert is_out_of_memory(RuntimeError(text)) is memory
