"""One line that says what is being waited for, beneath pytest's own progress and never inside it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import IO

QUIET_S = 15.0
"""Where output is no terminal, a step is mentioned only once it has lasted this long."""

# VT100: move down without changing the column (scrolling at the bottom) and up again, so that the saved position stays
# true; then draw on the line below and come back to where pytest left the cursor.
BELOW = "\x1bD\x1b[1A\x1b7\x1b[1B\r\x1b[2K"
BACK = "\x1b8"


class Progress:
    """``progress("a16w4_g128-torchao · reduce-overhead: compiling")`` until ``progress.done()``.

    On a terminal: the line below the cursor, redrawn each second with the seconds of the step, erased by ``done``.
    Elsewhere: a plain line, only for steps longer than ``quiet_s``. The stream's file descriptor is duplicated, so
    that pytest's capture of standard output in a test does not swallow it; call it while nothing is captured.
    """

    def __init__(
        self, stream: IO[str] | None, *, tty: bool | None = None, quiet_s: float = QUIET_S, redraw_s: float = 1.0
    ) -> None:
        self.tty = bool(stream is not None and stream.isatty()) if tty is None else tty
        self.quiet_s, self.redraw_s = quiet_s, redraw_s
        self._stream, self._descriptor = stream, self._duplicate(stream)
        self._prefix, self._text, self._since = "", "", 0.0
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None

    @staticmethod
    def _duplicate(stream: IO[str] | None) -> int | None:
        try:
            return None if stream is None else os.dup(stream.fileno())
        except (OSError, ValueError):  # a stream in memory: nothing captures it
            return None

    def case(self, number: int, total: int) -> None:
        """The case that the next steps belong to: ``[ 7/24]`` before each."""
        self._prefix = f"[{number:>{len(str(total))}}/{total}] "

    def step(self, text: str) -> None:
        """A new step begins; it lasts until the next one or ``done``. An empty text is ``done``."""
        if not text:
            self.done()
            return
        with self._lock:
            self._text, self._since = text, time.monotonic()
            if self.tty:
                self._draw(0)
            if self._stop is None and self._stream is not None:
                self._stop = threading.Event()
                threading.Thread(target=self._watch, args=(self._stop,), name="lowbit-progress", daemon=True).start()

    __call__ = step

    def done(self) -> None:
        """Nothing is waited for: erase the line and stop the clock."""
        with self._lock:
            if self._stop is not None:
                self._stop.set()
                self._stop = None
            if self._text and self.tty:
                self._write(f"{BELOW}{BACK}")
            self._text = ""

    def close(self) -> None:
        """``done``, and the duplicated descriptor is given back."""
        self.done()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._stream = self._descriptor = None

    def _watch(self, stop: threading.Event) -> None:
        said = ("", 0.0)
        while not stop.wait(self.redraw_s):
            with self._lock:
                step, seconds = (self._text, self._since), time.monotonic() - self._since
                if stop.is_set():
                    return
                if self.tty:
                    self._draw(seconds)
                elif step != said and seconds >= self.quiet_s:
                    # On a line of its own: pytest's dots may have left the cursor in the middle of one.
                    self._write(f"\n{self._line(seconds, 100)}\n")
                    said = step

    def _line(self, seconds: float, width: int) -> str:
        suffix = f" ({seconds:.0f} s)" if seconds >= 1 else ""
        return f"{self._prefix}{self._text}"[: width - len(suffix)] + suffix

    def _draw(self, seconds: float) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write(f"{BELOW}{self._line(seconds, width)}{BACK}")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            if self._descriptor is not None:
                os.write(self._descriptor, text.encode())
            else:
                self._stream.write(text)
                self._stream.flush()
        except OSError:  # the terminal is gone: the run goes on without a progress line
            self._hang_up()
