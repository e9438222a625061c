"""Launches and CUDA graphs that are noted instead of run, for the native prefill."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch
from test_runner import Recorder

from lowbit.kernels import prefill, runner, unpacking


def launches(monkeypatch):
    """Every launch of a kernel of ours: (kernel, grid, threads, argument, shared bytes, overlap)."""
    found = Recorder()
    monkeypatch.setattr(runner, "load", lambda shape, device, progress=None: found)
    monkeypatch.setattr(prefill, "load", lambda shape, device, progress=None: found)
    monkeypatch.setattr(unpacking, "_unpacker", lambda format, ku, device: found)
    return found.launched


def graphs(monkeypatch):
    """What was recorded into which pool; a replay is noted with its graph's number, and does nothing."""
    noted = []

    class Graph:
        def replay(self):
            noted.append(("replay", self.number))

    @contextmanager
    def record(graph, pool=None, capture_error_mode="global"):
        graph.number = sum(kind == "record" for kind, _ in noted)
        noted.append(("record", pool))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    numbers = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(numbers)}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")
    return noted
