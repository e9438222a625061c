""".ci/sanitize.py without a GPU: its edits, their bits by the emulator, and what it reads in the tool's words."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated import emulate_runner, unmet
from tiny import config

from lowbit.errors import LowbitError
from lowbit.kernels import batch, nvrtc, runner
from lowbit.kernels.geometry import MOST_SEQUENCES, Geometry
from lowbit.kernels.stream import LAYOUTS

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))

import sanitize
import sanitize_edits as edits
import sanitize_worker as worker

FILES = ("ptx", "common", "decode", "product", "batch_x", "batch", "attention", "embedding")
SMALL = {"hidden": 512, "inter": 1280, "heads": 4, "kv_heads": 2, "head_dim": 128, "eps": 1e-6}

# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", *edits.FAULTS])
@pytest.mark.parametrize("names", [(), ("lanes",), ("lanes", "handover")], ids="+".join)
def test_every_edit_applies_to_the_kernels_of_today_and_keeps_their_lines(names, fault):
    chosen = edits.edits_of(names, fault)
    assert {edit.file for edit in chosen} <= set(FILES)
    for name in FILES:
        text = (nvrtc.SOURCES / f"{name}.cu").read_text()
        changed = edits.edited(name, text, chosen)
        assert changed.count("\n") == text.count("\n")
        assert (changed != text) == any(edit.file == name for edit in chosen)


def test_no_edits_leave_the_shipped_text_with_its_files_named():
    lines = edits.reader(())(*FILES).split("\n")
    assert [line for line in lines if line.startswith("#line")] == [f'#line 1 "{name}.cu"' for name in FILES]
    assert "\n".join(line for line in lines if not line.startswith("#line")) == nvrtc.read_sources(*FILES)


def test_an_edit_that_does_not_match_once_is_an_error():
    text = (nvrtc.SOURCES / "product.cu").read_text()
    for old, count in (("no such line", 0), ("barrier_wait(", text.count("barrier_wait("))):
        with pytest.raises(LowbitError, match=rf"expected once in cuda/product.cu, found {count} times"):
            edits.edited("product", text, [edits.Edit("product", old, "")])
    with pytest.raises(LowbitError, match=r"no edit of the kernels is called fences; there are release, sums, lanes"):
        edits.edits_of(["fences"])


@pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
@pytest.mark.parametrize(("spec", "fault"), [("int4_g128", "release"), ("int4_g128:2", "sums")])
def test_the_checked_kernels_give_the_shipped_ones_bits_and_a_fault_others(monkeypatch, kernels_folder, spec, fault):
    """Pressed: stages of a ring are used three times. A second per variant on an idle core, for g++."""
    worker.press(monkeypatch.setattr)
    emulate_runner(monkeypatch, kernels_folder)

    def bits(*names, fault=""):
        with monkeypatch.context() as patched:
            worker.edit(names, fault, patched.setattr)
            return worker.check(spec, "cpu", (16,), intermediate_size=SMALL["inter"])

    shipped = bits()
    assert "40 stages of a block through a ring of 14, logits" in shipped
    assert bits(*edits.EDITS) == shipped
    assert bits(*edits.EDITS, fault=fault) != shipped


def test_attention_is_checked_by_4_warps_and_by_8(monkeypatch):
    worker.press(monkeypatch.setattr)
    ran = set()
    for spec in " ".join(sanitize.SPECS).split():
        name, count, kv, length = worker.parsed(spec)
        ran.add((Geometry.of(config(**worker.SHAPE), name, kv, count).attention(length).kernel, kv))
    few, most, long = "attention_kernel<1, 4>", "attention_kernel<1, 8>", "attention_kernel<4, 8>"
    assert ran >= {(few, ""), (few, "fp8"), (most, ""), (long, "fp8"), (long, "int8")}


def test_a_shape_that_uses_no_stage_three_times_is_refused():
    def step(tiles):
        gate_up = SimpleNamespace(
            kernel=runner.PRODUCTS["gate_up"], grid=(4, 1), argument=SimpleNamespace(tiles=tiles, ring=14)
        )
        return SimpleNamespace(plan=[gate_up], shape=Geometry("int4_g128", **SMALL))

    assert worker.reuse(step(4 * 29)) == (29, 14)
    with pytest.raises(
        LowbitError, match=r"int4_g128: a block takes 28 stages through a ring of 14: nothing is pressed"
    ):
        worker.reuse(step(4 * 28))


@pytest.mark.skipif(nvrtc.available() is not None, reason=f"NVRTC is not installed: {nvrtc.available()}")
@pytest.mark.parametrize(("count", "fault"), [(1, "release"), (8, "sums")])
def test_the_checked_kernels_compile_for_sm90_with_the_lines_of_their_files(monkeypatch, count, fault):
    for planted in ("", fault):
        with monkeypatch.context() as patched:
            worker.edit([*edits.EDITS], planted, patched.setattr)
            shape = Geometry("int4_g128", **SMALL, batch=count)
            kernel = (runner if count == 1 else batch).PRODUCTS["gate_up"]
            source = nvrtc.read_sources("ptx", *runner.sources(shape))
            binary = nvrtc.compile_source(source, [kernel], shape.macros(), "sm_90a")
        registers, spilled = binary.resources()[binary.names[kernel]]
        assert (spilled, registers * shape.threads <= 65536) == (0, True)
        assert all(
            f"{name}.cu".encode() in binary.cubin for name in ("ptx", "product", *(["batch"] if count > 1 else []))
        )


@pytest.mark.skipif(nvrtc.available() is not None, reason=f"NVRTC is not installed: {nvrtc.available()}")
@pytest.mark.parametrize("fault", worker.PLANTED)
def test_the_planted_kernels_compile(fault):
    assert nvrtc.compile_source(worker.planted_source(fault), [worker.KERNEL], {}, "sm_90a").names


# -- what is run -------------------------------------------------------------------------------------------------------


def test_the_default_specs_are_every_format_and_2_to_8_sequences_by_both_tools_and_every_fault_is_planted():
    for tool in sanitize.OPTIONS:
        asked = [one for one in sanitize.processes([tool]) if not one.fault]
        specs = [[*spec.split(":"), "1"][:2] for one in asked for spec in one.specs]
        assert {name for name, count in specs if count == "1"} >= set(LAYOUTS)
        assert {int(count) for _, count in specs} == set(range(1, MOST_SEQUENCES + 1))
        assert {tool} == {one.tool for one in asked}
    faults = [one for one in sanitize.processes([*sanitize.OPTIONS]) if one.fault]
    assert {one.fault for one in faults} == {*edits.FAULTS, *worker.PLANTED}
    assert all(one.found_in for one in faults)
    assert sanitize.EDITS.split(",") == [*edits.EDITS]


def test_the_tool_watches_every_kernel_of_a_step():
    launched = {*runner.kernels(Geometry("bf16", **SMALL)), *runner.kernels(Geometry("bf16", **SMALL, batch=2))}
    for kernel in {*launched, worker.KERNEL}:
        assert any(f"{name}_kernel" in kernel for name in sanitize.KERNELS), kernel


def test_a_dry_run_prints_commands_that_the_worker_understands(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert sanitize.main(["--dry-run", "int8:5", "--tool", "racecheck"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 1 + 4
    for line in lines:
        assert line[0] == "env"
        assert line[line.index("--edits") + 1] == "lanes,handover"
    assert lines[0][lines[0].index(str(sanitize.WORKER)) + 1 :] == ["--edits", "lanes,handover", "--each", "int8:5"]
    sanitize.main(["--dry-run", "--tool", "memcheck", "int8"])
    assert "--edits" not in capsys.readouterr().out  # memcheck sees what is shipped


# -- what the tool says ------------------------------------------------------------------------------------------------
# The tool's lines are an H200's (2026.4.0, 22 November 2026), trimmed; the worker's are today's.

CLEAN = """========= COMPUTE-SANITIZER
checked int4_g128:8: 104 stages of a block through a ring of 14, logits ee367259; 20 launches, 30.6 s
checked bf16:2: 208 stages of a block through a ring of 8, logits ac1157bc; 20 launches, 39.8 s
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
COPY = "bulk_copy(void *, const void *, int, unsigned long long *, unsigned long long)"
RING = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {COPY}+0x2980 in lowbit.cu:36
=========     and Read access at Words words_at<(int)512>(const uint4 *, int, int)+0x11e0 in \
lowbit.cu:271 [3968 hazards]
=========     and Read access at Words words_at<(int)512>(const uint4 *, int, int)+0x11f0 in \
lowbit.cu:271 [3968 hazards]
=========     and Read access at void load_scale_words<(int)2>(unsigned int (&)[T1], const unsigned char *)+0x1790 in \
lowbit.cu:327 [1984 hazards]
========= 
========= Warning: Maximum number of hazards reached. Environment variable NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS \
can be used to increase this count.
========= 
checked int4_g128: 104 stages of a block through a ring of 14, logits 185f5e02; 14 launches, 29.4 s
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""
SUMS = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at void finish_tile<(int)0>(const Batch &, const float *, int, int, \
int, float, unsigned long long (&)[4])+0x21c0 in lowbit.cu:1060
=========     and Write access at void batch_kernel<(int)512, (bool)1, (int)0>(Batch)+0x1d90 in \
lowbit.cu:1160 [14920 hazards]
=========     and Write access at void batch_kernel<(int)512, (bool)1, (int)0>(Batch)+0x1da0 in \
lowbit.cu:1160 [14096 hazards]
========= 
========= Error: Race reported between Write access at void batch_kernel<(int)512, (bool)1, (int)0>(Batch)+0x1d90 in \
lowbit.cu:1160
=========     and Write access at void batch_kernel<(int)512, (bool)1, (int)0>(Batch)+0x1d90 in \
lowbit.cu:1160 [4316 hazards]
========= 
checked int4_g128:8: 104 stages of a block through a ring of 14, logits bbdc5690; 20 launches, 27.0 s
========= RACECHECK SUMMARY: 12 hazards displayed (11 errors, 1 warning)
"""
SHARED = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at embed_planted_embed_kernel(Planted)+0xb0 in lowbit.cu:4
=========     and Read access at embed_planted_embed_kernel(Planted)+0xc0 in lowbit.cu:5 [256 hazards]
========= 
planted shared: ran
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BOUNDS = """========= COMPUTE-SANITIZER
planted bounds: ran
========= Invalid __global__ write of size 4 bytes
=========     at embed_planted_embed_kernel(Planted)+0x80 in lowbit.cu:4
=========     by thread (63,0,0) in block (0,0,0)
=========     Access to 0x7fa834800100 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7fa834800000 of size 256 bytes
========= 
========= ERROR SUMMARY: 1 error
"""
INTERNAL = """========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
========= 
RuntimeError: CUDA error: an illegal memory access was encountered
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
TWO = sanitize.Process("racecheck", ("int4_g128:8", "bf16:2"))
ONE = sanitize.Process("racecheck", ("int4_g128",))
BY_NAME = {(one.fault, *one.specs): one for one in sanitize.FAULTS}


def test_reports_are_read_by_what_met_where():
    assert sanitize.read_report(CLEAN) == (0, ("int4_g128:8", "bf16:2"), Counter(), CLEAN.splitlines()[2])
    ring = sanitize.read_report(RING)
    where = "Write bulk_copy lowbit.cu:36 | Read words_at lowbit.cu:271 | Read load_scale_words lowbit.cu:327"
    assert (ring.errors, ring.places.most_common(1)) == (3, [(where, 3968 + 3968 + 1984)])
    assert sanitize.read_report(SUMS).places == {
        "Read finish_tile lowbit.cu:1060 | Write batch_kernel lowbit.cu:1160": 14920 + 14096,
        "Write batch_kernel lowbit.cu:1160": 4316,
    }
    by_file = sanitize.read_report(SUMS.replace("lowbit.cu:1060", "/tmp/x/batch.cu:206"))
    assert "Read finish_tile batch.cu:206 | Write batch_kernel lowbit.cu:1160" in by_file.places
    bounds = sanitize.read_report(BOUNDS)
    assert bounds.errors == 1
    assert bounds.places == {"Invalid __global__ write: embed_planted_embed_kernel lowbit.cu:4": 1}


@pytest.mark.parametrize(
    ("process", "text", "code", "why"),
    [
        (TWO, CLEAN, 0, ""),
        (ONE, RING, 0, "3 reported"),
        (ONE, INTERNAL, 7, "1 reported"),
        (TWO, CLEAN, 1, "exit code 1, checked int4_g128:8, bf16:2"),
        (ONE, CLEAN, 0, "checked int4_g128:8, bf16:2"),  # other than asked
        (TWO, "\n".join(CLEAN.splitlines()[:2]), -9, "no summary, exit code -9: checked int4_g128:8"),
        (TWO, "", 1, "no summary, exit code 1: no output"),
        (BY_NAME["release", "int4_g128"], RING, 0, ""),
        (BY_NAME["sums", "int4_g128:8"], SUMS, 0, ""),
        (BY_NAME["sums", "int4_g128:8"], RING, 0, "not found in finish_tile"),  # reported, but elsewhere
        (BY_NAME["sums", "int4_g128:8"], CLEAN, 0, "not found in finish_tile"),
        (BY_NAME[("shared",)], SHARED, 0, ""),
        (BY_NAME[("bounds",)], BOUNDS, 0, ""),
        (BY_NAME[("bounds",)], "", 0, "no summary"),
    ],
)
def test_what_a_process_must_end_as(process, text, code, why):
    found = sanitize.wrong(process, sanitize.read_report(text), code)
    assert why in found if why else found == ""


@pytest.fixture
def ask(tmp_path, monkeypatch, capfd):
    """A function: racecheck of int4_g128 by a tool that says ``said`` of each fault ("": of no fault)."""
    monkeypatch.setattr(sanitize, "unmet_gpu", lambda: None)

    def run(said, *options):
        for name, text in said.items():
            (tmp_path / f"said.{name}").write_text(text)
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            '#!/bin/sh\nfault=\nwhile [ $# -gt 0 ]; do [ "$1" = --fault ] && fault=$2; [ "$1" = --version ] && '
            f'echo Version 2026.4.0.0; shift; done\n[ "$fault" = slow ] && sleep 60\ncat {tmp_path}/said.$fault\n'
        )
        tool.chmod(0o755)
        code = sanitize.main(["--sanitizer", str(tool), "--tool", "racecheck", *options, "int4_g128"])
        return code, capfd.readouterr().out

    return run


NONE = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
GOOD = {"": f"checked int4_g128: pressed\n{NONE}", "shared": SHARED, "release": RING, "sums": SUMS}


def test_exit_code_0_means_clean_and_every_fault_found(ask, tmp_path):
    code, out = ask(GOOD, "--logs", str(tmp_path / "logs"))
    assert code == 0
    assert "compute-sanitizer: Version 2026.4.0.0" in out
    assert "ok     racecheck int4_g128: 0 errors" in out
    assert "ok     racecheck planted sums int4_g128:8: found in finish_tile" in out
    assert out.endswith("1 of 1 processes clean, 4 of 4 planted faults found\n")
    assert (tmp_path / "logs" / "00.txt").read_text() == GOOD[""]


@pytest.mark.parametrize(
    ("said", "told", "last"),
    [
        ({"": RING}, "FAILED racecheck int4_g128: 3 reported", "0 of 1 processes clean, 4 of 4"),
        (
            {"sums": NONE},
            "FAILED racecheck planted sums int4_g128:8: the fault was not found",
            "1 of 1 processes clean, 3 of 4",
        ),
        ({"": ""}, "FAILED racecheck int4_g128: no summary", "0 of 1 processes clean, 4 of 4"),
    ],
)
def test_exit_code_1_means_reported_or_not_found(ask, said, told, last):
    code, out = ask(GOOD | said)
    assert (code, told in out, last in out) == (1, True, True)


def test_a_process_is_ended_at_its_limit(tmp_path):
    log = tmp_path / "log"
    assert sanitize.run(["sh", "-c", "echo started; sleep 60 & wait"], {"PATH": "/usr/bin:/bin"}, log, 0.5) == -9
    assert log.read_text() == "started\n"


def test_exit_code_2_means_no_tool_or_no_such_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sanitize, "FALLBACK", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert "pip install nvidia-cuda-sanitizer-api" in capsys.readouterr().err
    assert sanitize.main(["--sanitizer", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert sanitize.main([]) == 2
    assert "are SM90's, this is SM89" in capsys.readouterr().err
