"""Launches and CUDA graphs that are noted instead of run, for the native prefill."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import ClassVar

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


class Stream:
    """Notes what is done on it, as (what, the stream, with what), in a log that all streams share."""

    log: ClassVar = []
    current: ClassVar = None

    def __init__(self, device=None, priority=0):
        self.priority = priority

    def record_event(self):
        event = object()
        self.log.append(("record", self, event))
        return event

    def wait_event(self, event):
        self.log.append(("wait", self, event))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


def streams(monkeypatch):
    """Streams that note; returns their log. A work notes itself there: ("run", Stream.current, what it is)."""
    main = Stream()
    monkeypatch.setattr(Stream, "log", [])
    monkeypatch.setattr(Stream, "current", main)

    @contextmanager
    def on(stream):
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    return Stream.log


def ordered(log):
    """Of the works in a log: the pairs (earlier, later) that streams and events put in order."""
    behind, events, works = {}, {}, {}
    for what, stream, thing in log:
        past = behind.setdefault(stream, set())
        if what == "record":
            events[thing] = set(past)
        elif what == "wait":
            past |= events[thing]
        else:
            works[thing] = set(past)
            past.add(thing)
    return {(earlier, later) for later, past in works.items() for earlier in past}


def graphs(monkeypatch):
    """What was recorded into which pool; a replay is noted with its graph's number, and does nothing."""
    noted = []

    class Graph:
        def replay(self):
            noted.append(("replay", self.number))

    @contextmanager
    def record(graph, pool=None, stream=None):
        graph.number = sum(kind == "record" for kind, _ in noted)
        noted.append(("record", pool))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    numbers = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(numbers)}")
    return noted
