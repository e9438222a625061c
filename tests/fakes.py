"""Stand-ins that let the plugin's tests run in milliseconds: a device, a model choice and a lab that measures nothing.

FakeLab reads its speeds from ``speeds.json`` in the working directory, ``{"<substring of a case id>": tok/s}``, so a
test plants a slowdown by rewriting the file. Everything behind the lab (records, baselines, gate, runs) is real.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.record import Record

FAKE_GPU = Device(
    kind="cuda",
    index=0,
    name="Fake GPU",
    slug="fake-gpu",
    capability=(9, 0),
    total_mib=100_000,
    multiprocessors=100,
    driver="1.0",
    cuda="13.0",
)
FAKE_CHOICE = SimpleNamespace(
    name="embedded", load_format="auto", why="a fake", parameters=1_000_000, source=None, config=None
)
DEFAULT_TOK_S = 100.0


class FakeLab:
    """The lab's face, without a model."""

    def __init__(self, device, choice, text=None, progress=print):
        self.device, self.choice, self.progress = device, choice, progress
        self.spent = SimpleNamespace(load=0.0, quantize=0.0, compile=0.0, measure=0.0, quality=0.0, confirm=0.0, total=lambda: 0.0)
        self.released = 0

    def unmet(self, case):
        return Unmet("capability", "needs SM100, this is SM90") if case.format.id in _plan().get("skip", []) else None

    def release(self):
        self.released += 1

    def close(self):
        self.release()

    def measure(self, case, nodeid, rounds):
        plan = _plan()
        _misbehave(plan, case)
        rounds(lambda: None, rounds=3)
        speed = next((value for key, value in plan.items() if key in case.name and isinstance(value, (int, float))), DEFAULT_TOK_S)
        metrics = {"quality": {"kld_embedded_512_8176tok": 0.01, "ppl_embedded_512": 4.0}}.get(
            case.kind, {"vram_peak_mib": 1000.0, "weights_mib": 500.0, "prefill_tok_s": 1000.0}
        )
        metrics = dict(metrics)
        if case.kind == "decode":
            metrics["decode_tok_s"] = speed
        elif case.kind == "prefill":
            metrics["ttft_ms"] = 10.0
        return Record(
            case=nodeid,
            kind=case.kind,
            format=case.format.id,
            mode=case.mode,
            workload=case.workload.id if case.workload else None,
            model=self.choice.name,
            load_format=self.choice.load_format,
            dtype="bf16",
            metrics=metrics,
            outcome="void" if plan.get("void", "-") in case.name else "measured",
            error="thermal slowdown" if plan.get("void", "-") in case.name else None,
            info={"wall_s": 0.1},
        )


def _plan():
    path = Path("speeds.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _misbehave(plan, case):
    """The faults a test asks for: an exception, a CUDA fault, an out-of-memory, a kill, a Ctrl-C."""
    if plan.get("error", "-") in case.name:
        raise LowbitError(f"NaN logits from {case.format.id}")
    if plan.get("cuda_fault", "-") in case.name and os.environ.get("LOWBIT_FAKE_CHILD") is None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if plan.get("kill", "-") in case.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.get("interrupt", "-") in case.name:
        raise KeyboardInterrupt
