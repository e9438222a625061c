"""Decode steps of lowbit's own kernels on small Llamas, for .ci/sanitize.py, which runs this under compute-sanitizer.

    python .ci/sanitize_worker.py [--edits lanes,handover] [--fault NAME] [--each] SPEC ...

SPEC is FORMAT[:batch[:kv[:length]]]: a weight format, sequences (1), the KV cache's codes ("", int8, fp8), its
positions (400). Products have 4 blocks and short rings, so that stages, and places of sums, are used again and again.
``--emulate FOLDER`` runs the same on the CPU (tests/emulator), without the tool.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sanitize_edits import FAULTS, edits_of, reader

from lowbit.errors import LowbitError
from lowbit.kernels import batch, geometry, launch, nvrtc, product_launch, runner
from lowbit.kernels.stream import stage_columns

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 3328,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 128,
}
"""3328 columns are 13 stages of int4: batch.slices cuts them unevenly."""
BLOCKS, RING_BYTES = 4, 112 * 1024
KERNEL = "embed_planted_embed_kernel"
PLANTED = {
    "bounds": "op.out[threadIdx.x + op.past] = 1.f;",
    "shared": "x[threadIdx.x] = threadIdx.x;\n  op.out[threadIdx.x] = x[63 - threadIdx.x];",
}
"""Faults in a kernel of their own, of 64 threads: a write behind a buffer, a read of what another warp writes."""
Set = Callable[[object, str, object], None]


def press(set_to: Set = setattr) -> None:
    """Few blocks and short rings for all products; every plan has room for the edit ``handover``."""
    for module in (batch, geometry, product_launch):
        set_to(module, "BLOCKS", BLOCKS)
    for module in (batch, geometry, runner):
        set_to(module, "RING_BYTES", RING_BYTES)
    planned = batch.plan

    def plan(*args: Any) -> batch.Plan:
        found = planned(*args)
        return found._replace(shared_bytes=found.shared_bytes + found.turns * 8 + 16)

    set_to(batch, "plan", plan)


def edit(names: list[str], fault: str = "", set_to: Set = setattr) -> None:
    """Kernels are compiled with these edits and with line numbers, and kept apart from lowbit's own."""
    compiled, folder = nvrtc._compile, nvrtc.cache_folder
    set_to(nvrtc, "read_sources", reader(edits_of(names, fault)))
    set_to(
        nvrtc, "_compile", lambda text, kernels, options: compiled(text, kernels, [*options, "--generate-line-info"])
    )
    set_to(nvrtc, "cache_folder", lambda: folder().with_name("sanitized"))


def count_launches(each: bool, set_to: Set = setattr) -> dict[str, int]:
    """Launches by kernel from now on; ``each`` is waited for, so that a kernel that dies is the one named."""
    real, counts = launch.Module.launch, dict[str, int]()

    def counted(self: Any, kernel: str, *args: Any, **kwargs: Any) -> None:
        counts[kernel] = counts.get(kernel, 0) + 1
        real(self, kernel, *args, **kwargs)
        if each:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise LowbitError(f"{kernel} died, the {sum(counts.values())}th launch: {error}") from error

    set_to(launch.Module, "launch", counted)
    return counts


def reuse(step: Any) -> tuple[int, int]:
    """(stages that a block of gate_up takes at least, its ring). Raises LowbitError if no stage is used three times."""
    gate_up = next(one for one in step.plan if "SILU_MUL" in one.kernel)
    shape, ring = step.shape, gate_up.argument.ring
    stages = gate_up.argument.tiles // gate_up.grid[0] * (shape.hidden // stage_columns(shape.format, shape.hidden))
    if stages <= 2 * ring:
        raise LowbitError(f"{shape.format}: a block takes {stages} stages through a ring of {ring}: nothing is pressed")
    return stages, ring


def parsed(spec: str) -> tuple[str, int, str, int]:
    """Format, sequences, the KV cache's codes, its positions."""
    name, count, kv, length = (*spec.split(":"), "", "", "")[:4]
    return name, int(count or 1), kv, int(length or 400)


@torch.no_grad()
def check(spec: str, device: str = "cuda", positions: tuple[int, ...] = (), **changes: Any) -> str:
    """Steps of ``spec`` at 16 and the cache's last position: what was run, with a hash of its logits' bits.

    Raises LowbitError if logits are not finite or a step did not advance.
    """
    from streaming import build

    name, count, kv, places = parsed(spec)
    fields = {**SHAPE, "max_position_embeddings": max(512, 2 * places), **changes}
    torch.manual_seed(0)
    _, _, decoder, step = build(name, places, device, kv=kv, batch=count, **fields)
    stages, ring = reuse(step)
    found = hashlib.sha256()
    for place in positions or (16, places - 1):
        decoder.position.fill_(place)
        decoder.token.fill_(place % 512)
        step.launch()
        if device == "cuda":
            torch.cuda.synchronize()
        if int(decoder.position) != place + 1 or not step.logits.isfinite().all():
            raise LowbitError(
                f"{spec}: a step at {place} ended at {int(decoder.position)}, logits finite: "
                f"{bool(step.logits.isfinite().all())}"
            )
        found.update(step.logits.cpu().numpy().tobytes())
    return f"{spec}: {stages} stages of a block through a ring of {ring}, logits {found.hexdigest()[:8]}"


def planted_source(fault: str) -> str:
    """CUDA C++ of a kernel with one of PLANTED."""
    return (
        f"struct Planted {{ float* out; int past; }};\n__global__ void {KERNEL}(Planted op) {{\n"
        f"  __shared__ float x[64];\n  {PLANTED[fault]}\n}}"
    )


def run_planted(fault: str) -> None:
    class Planted(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p), ("past", ctypes.c_int))

    major, minor = torch.cuda.get_device_capability()
    binary = nvrtc.compile_source(planted_source(fault), [KERNEL], {}, f"sm_{major}{minor}a")
    out = torch.zeros(64, device="cuda")
    launch.Module(binary).launch(KERNEL, (1, 1), 64, Planted(out.data_ptr(), 1))
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--edits", default="", help="comma-separated, of sanitize_edits.EDITS")
    parser.add_argument("--fault", default="", choices=["", *FAULTS, *PLANTED])
    parser.add_argument("--each", action="store_true", help="wait for every launch")
    parser.add_argument("--emulate", type=Path, metavar="FOLDER", help="on the CPU; kernels are compiled into FOLDER")
    given = parser.parse_args(arguments)
    edit([name for name in given.edits.split(",") if name], "" if given.fault in PLANTED else given.fault)
    if given.fault in PLANTED:
        run_planted(given.fault)
        print(f"planted {given.fault}: ran", flush=True)
        return
    started = time.monotonic()
    press()
    sys.path.insert(0, str(ROOT / "tests"))
    counts = {}
    if given.emulate:
        import emulated

        emulated.emulate_runner(SimpleNamespace(setattr=setattr), given.emulate)
    else:
        counts = count_launches(given.each)
    for spec in given.specs:
        counts.clear()
        told = check(spec, "cpu" if given.emulate else "cuda")
        launches = "emulated" if given.emulate else f"{sum(counts.values())} launches"
        print(f"checked {told}; {launches}, {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
