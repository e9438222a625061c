"""LogitsStore: reference logits on the host, in memory or, when they are too many, in a temporary file."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LowbitError


def choose_host_bytes() -> int:
    """A quarter of the host's memory: beside the master weights and a page cache that still holds the checkpoint."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


class LogitsStore:
    """Logits [windows, positions, V] that are appended in order, sealed, and then read block by block.

    Dtype and V are those of the first block appended. The file never has a name, so that nothing is left of it even
    after a kill; it is written before it is mapped, so that a full disk is an error here and not a bus error later.
    """

    def __init__(self, shape: tuple[int, int], *, directory: Path | None = None, host_bytes: int | None = None) -> None:
        self._windows, self._positions = shape
        self._directory = directory
        self._host_bytes = choose_host_bytes() if host_bytes is None else host_bytes
        self._file: IO[bytes] | None = None
        self._rows: Tensor | None = None  # [windows * positions, V]
        self._dtype: torch.dtype | None = None
        self._vocab = 0
        self._filled = 0

    def __len__(self) -> int:
        return self._windows

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    @property
    def nbytes(self) -> int:
        """Size of all logits in bytes; 0 before the first block."""
        return self._windows * self._positions * self._vocab * self._dtype.itemsize if self._dtype else 0

    def append(self, logits: Tensor) -> None:
        """Add the next block, [P, V] on any device. Raises LowbitError when the disk can't take it."""
        if self._dtype is None:
            self._open(logits)
        block = logits.detach().to("cpu").contiguous()
        if self._rows is not None:
            self._rows[self._filled : self._filled + len(block)] = block
        else:
            self._write(block)
        self._filled += len(block)

    def seal(self) -> None:
        """End the writing; from now on it can be read."""
        if self._filled != self._windows * self._positions:
            raise ValueError(f"expected {self._windows * self._positions} positions, got {self._filled}")
        if self._file is not None and self._dtype is not None:
            self._flush()
            mapped: Any = np.memmap(self._file, dtype=np.uint8, mode="r+")
            self._rows = torch.from_numpy(mapped).view(self._dtype).view(-1, self._vocab)

    def read(self, window: int, positions: slice) -> Tensor:
        """[P, V] of one window, on the host: a view, not a copy."""
        if self._rows is None:
            raise ValueError("the logits are closed or not sealed yet")
        first = window * self._positions
        return self._rows[first + positions.start : first + positions.stop]

    def close(self) -> None:
        """Free memory and file. May be called twice."""
        self._rows = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, logits: Tensor) -> None:
        self._dtype, self._vocab = logits.dtype, logits.shape[-1]
        if self.nbytes <= self._host_bytes:
            self._rows = torch.empty(self._windows * self._positions, self._vocab, dtype=self._dtype)
            return
        try:
            self._file = tempfile.TemporaryFile(prefix="lowbit-logits-", dir=self._directory)
        except OSError as error:
            raise self._refuse(error) from error
        weakref.finalize(self, self._file.close)

    def _write(self, block: Tensor) -> None:
        assert self._file is not None
        try:
            self._file.write(block.view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._refuse(error) from error

    def _flush(self) -> None:
        assert self._file is not None
        try:
            self._file.flush()
        except OSError as error:
            raise self._refuse(error) from error

    def _refuse(self, error: OSError) -> LowbitError:
        where = self._directory or tempfile.gettempdir()
        return LowbitError(
            f"can't keep {self.nbytes / 1e9:.1f} GB of reference logits in {where}: {error}; "
            "free space there or point TMPDIR at a larger disk"
        )
