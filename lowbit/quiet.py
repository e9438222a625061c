"""Imports libraries without their noise: what they print on the way in is kept, and shown only if the import fails."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import IO, Any, TextIO


class _Tap:
    """Stands in for sys.stdout or sys.stderr: writes to ``sink`` while it is open, to the real stream ever after.

    A library may keep the stream it finds at import (a logging handler does), so this one must outlive the import.
    """

    def __init__(self, stream: TextIO, sink: IO[str]) -> None:
        self._stream = stream
        self.sink: IO[str] | None = sink

    def write(self, text: str) -> int:
        return (self.sink or self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def captured_output() -> Iterator[Callable[[], str]]:
    """Keep everything printed inside, by Python or by compiled code, off the terminal; yields a reader of it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
        streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        taps = {name: _Tap(stream, sink) for name, stream in streams.items() if stream is not None}
        saved: dict[int, int] = {}

        def read() -> str:
            sink.flush()
            return _contents(sink)

        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                if name in taps:
                    streams[name].flush()
                    setattr(sys, name, taps[name])
                with suppress(OSError):  # a daemon may have closed its descriptors: then nothing can reach them
                    saved[number] = os.dup(number)
                    os.dup2(sink.fileno(), number)
            yield read
        finally:
            sink.flush()
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
            for name, tap in taps.items():
                tap.sink = None
                if getattr(sys, name) is tap:
                    setattr(sys, name, streams[name])


def _contents(sink: IO[str]) -> str:
    # os.pread leaves the shared file offset alone, which compiled code is still writing at
    size = os.fstat(sink.fileno()).st_size
    return os.pread(sink.fileno(), size, 0).decode("utf-8", "replace")


def _hush_transformers(module: ModuleType) -> None:
    # its Llama imports torchao on first use, which prints: do that now
    importlib.import_module("transformers.models.llama.modeling_llama")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()


_HUSH: dict[str, Callable[[ModuleType], None]] = {"transformers": _hush_transformers}
_LOGGERS = frozenset({"bitsandbytes"})
"""Libraries that log too much: at import, and LLM.int8 on every call, in every layer, that it casts to fp16.

Silenced before the import. A handler that keeps records (pytest's) would keep the frames of their exceptions, and
with these what the importing functions hold, a model among it.
"""
_TORCH = "torch.utils._pytree"
"""Logs a deprecation per class of torchao's, by a handler with the stream that torch found when it was imported."""
_hushed: set[str] = set()


def quiet_import(name: str) -> ModuleType:
    """Import the module ``name`` in silence: no banners, no deprecation warnings, no progress bars.

    Libraries that would go on talking are hushed as well, even if somebody imported them before. Raises what the
    import raises, with a note holding what the library printed.
    """
    loaded = sys.modules.get(name)
    if loaded is not None and (name in _hushed or name not in _HUSH.keys() | _LOGGERS):
        return loaded
    with captured_output() as output, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in {name} & _LOGGERS | {_TORCH}:
            logging.getLogger(logger).setLevel(logging.ERROR)
        try:
            module = importlib.import_module(name)
            if hush := _HUSH.get(name):
                hush(module)
            _hushed.add(name)
        except BaseException as error:
            if printed := output().strip():
                error.add_note(f"{name} printed while it was imported:\n{printed}")
            raise
    return module
