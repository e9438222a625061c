"""torch.cuda on a machine without one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

MIB = 1024 * 1024


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put it in place. Its log counts calls; an event's time is the stream's clock at its record."""
    log = SimpleNamespace(calls=[], now_ms=0.0, events=0, reserved=0)

    class Event:
        def __init__(self, enable_timing=False):
            self.timing = enable_timing
            log.events += 1

        def record(self):
            self.at = log.now_ms

        def synchronize(self):
            log.calls.append("event.synchronize")

        def elapsed_time(self, end):
            assert self.timing
            assert end.timing
            return end.at - self.at

    for name in ("empty_cache", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: log.calls.append(name))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.calls.append("workspaces"), raising=False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: log.reserved * MIB)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: log.calls.append(name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return log
