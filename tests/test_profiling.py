"""--profile on a CPU: the files and figures of a real Llama of two layers; what a GPU adds, with torch.cuda faked."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_lab import CPU, DECODE, PREFILL, SHAPE, decode, make_lab, take

from lowbit import compilers, process_state, profiling, texts
from lowbit.cases import Case
from lowbit.formats import FORMATS
from lowbit.profiling import Profiler
from lowbit.record import Record

ROOT = Path(__file__).parents[1]
GPU = dataclasses.replace(CPU, kind="cuda", capability=(9, 0))


@pytest.fixture(scope="module")
def bench(tiny_folder, tmp_path_factory):
    profiler = Profiler(CPU, tmp_path_factory.mktemp("profiles"))
    made = make_lab(tiny_folder, texts.Source("story", 32, None), profiler=profiler)
    yield made
    made.close()


def trace_names(folder: Path) -> set[str]:
    return {event.get("name") for event in json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]}


def test_an_eager_decode_has_its_trace_and_its_linears_bytes(bench):
    case = decode()
    record = take(bench, case)
    profile = record.info["profile"]
    folder = bench.profiler.folder(case)
    assert folder.name == "decode-bf16-torch-eager-b2_c0"
    assert "aten::mm" in trace_names(folder)
    assert profile["units"] == DECODE.new_tokens * 2  # tokens: of a batch of two
    assert len(profile["kernels"]) == profiling.SHOWN < profile["distinct"]
    times = [kernel["us"] for kernel in profile["kernels"]]
    assert times == sorted(times, reverse=True)
    assert sum(times) <= profile["kernels_us"]
    rows = {row["name"]: row for row in json.loads((folder / "kernels.json").read_text())["kernels"]}
    assert len(rows) == profile["distinct"]
    # 2 layers of 7 linears and a head, each read once a step
    weights = sum(parameter.numel() * 2 for parameter in bench.host.skeleton().parameters())
    table = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
    read = sum(row["read_bytes"] or 0 for row in rows.values()) / DECODE.new_tokens
    assert read == pytest.approx(weights - table, rel=0.01)  # all but the embedding table and the norms
    assert not (folder / "inductor").exists()
    assert not (folder / "memory.pickle").exists()
    assert not [module for module in bench._current.model.modules() if module._forward_hooks]


def test_a_prefill_is_counted_by_the_pass(bench):
    case = Case("prefill", FORMATS["bf16-torch"], "eager", PREFILL)
    profile = take(bench, case).info["profile"]
    assert profile["units"] == profiling.STEPS
    # each linear of two layers once a pass; the head's single row may go another way
    assert next(kernel["calls"] for kernel in profile["kernels"] if kernel["name"] == "aten::mm") in (14, 15)


def test_a_compiled_case_leaves_what_inductor_wrote_even_where_its_caches_are_warm(tmp_path):
    profiler, case, linear = Profiler(CPU, tmp_path), decode(mode="default"), torch.nn.Linear(64, 64)
    folder = profiler.folder(case)

    def step(x):
        return torch.nn.functional.silu(linear(x)) * 2

    def repeat(function, times):
        for _ in range(times):
            function(torch.ones(1, 64))

    for _ in range(2):
        for path in folder.rglob("output_code.py"):
            path.unlink()
        record = case.record("x", "m", "auto")
        with process_state.preserved_state(), torch.no_grad(), profiler.recording(case, record):
            compiled = compilers.compile_call(step, "default", CPU, {})
            compiled(torch.ones(1, 64))
            profiler.take(case, linear, partial(repeat, compiled), 1)
        assert list(folder.glob("inductor/torchinductor/*/output_code.py"))
    assert any("cpp_fused" in name for name in trace_names(folder))
    assert [path for path in folder.glob("trace/*.log") if path.stat().st_size > 1000]  # what tlparse reads
    assert record.info["profile"]["kernels"]
    left = [getattr(handler, "root_dir", None) for handler in logging.getLogger("torch.__trace").handlers]
    assert str(folder / "trace") not in left


def test_inductors_settings_are_given_back(tmp_path):
    import torch._inductor.config as inductor

    profiler = Profiler(CPU, tmp_path)
    case = decode(mode="default")
    with process_state.preserved_state(), profiler.recording(case, case.record("x", "m", "auto")):
        assert not inductor.fx_graph_cache
        assert inductor.trace.enabled
        assert inductor.cpp.enable_kernel_profile
        assert not inductor.benchmark_kernel
    assert inductor.fx_graph_cache
    assert not inductor.trace.enabled
    assert not inductor.cpp.enable_kernel_profile


def test_a_gpus_case_has_a_snapshot_also_when_it_fails(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **options: calls.append(enabled))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"a snapshot"))
    profiler = Profiler(GPU, tmp_path)
    case = decode(mode="reduce-overhead")
    record = case.record("x", "m", "auto")

    def fail():
        with process_state.preserved_state(), profiler.recording(case, record):
            assert inductor.benchmark_kernel  # Inductor then notes its kernels' bytes
            raise RuntimeError("of a test")

    with pytest.raises(RuntimeError, match="of a test"):
        fail()
    assert calls == ["all", None]
    assert (profiler.folder(case) / "memory.pickle").read_bytes() == b"a snapshot"
    assert not inductor.benchmark_kernel
    assert "profile" not in record.info


def test_without_a_profiler_a_record_has_no_profile(tiny_folder):
    made = make_lab(tiny_folder, texts.Source("story", 32, None))
    assert "profile" not in take(made, decode()).info
    made.close()


def test_pytest_benches_profile_on_this_cpu(tiny_folder, tmp_path):
    """The command itself, in a process of its own: files, table, nothing kept."""
    for name in ("benches", "conftest.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    arguments = ["benches", "--profile", "--model", str(tiny_folder), "-k", "bf16-torch-eager and decode"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "CI"))}
    environment |= {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (tmp_path / ".lowbit" / "profiles").glob("*/decode-bf16-torch-eager-b1_c0")
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "kernels.json"}
    assert not (tmp_path / ".lowbit" / "runs").exists()
    text = result.stdout
    assert "decode[bf16-torch-eager-b1_c0]: kernel" in text
    assert "aten::mm" in text
    assert "GB/s of kernel time" in text
    assert "GB/s: bytes that a kernel must read" in text
    assert "profiled: nothing was kept or compared" in text


def test_the_table_of_a_record():
    from lowbit.report import kernels

    record = Record("benches/test_decode.py::test_decode[x-b1]", "decode", "x", "default", "b1", "m", "auto")
    assert kernels.tables([record]) == ""
    record.metrics = {"decode_tok_s": 250.0, "mbu": 0.5}
    record.info = {
        "ceilings": {"read_gb_s": 4000.0},
        "profile": {
            "folder": "/runs/a",
            "units": 8,
            "kernels_us": 2000.0,
            "distinct": 12,
            "kernels": [
                {"name": "void gemv<" + "x" * 200 + ">(int)", "calls": 225.0, "us": 1500.0, "gb_s": 3210.4},
                {"name": "flash", "calls": 32.0, "us": 300.0, "gb_s": None},
            ],
        },
    }
    text = kernels.tables([record])
    lines = text.splitlines()
    assert lines[2].startswith("gemv<xxx")
    assert lines[2].endswith("225.0    1500       75.0%  3210")
    assert lines[3].endswith("–")
    assert "2 of 12 kernels, 90 % of 2000 µs of kernels per token; wall, without the profiler: 4000 µs" in text
    # half of 4,000 GB/s for 4 ms is 8 GB; in the 2 ms of kernels that is 4,000 GB/s
    assert "weights and KV: 8000 MB per token = 4000 GB/s of kernel time, 2000 of wall time" in text
    assert max(map(len, lines)) <= 110
