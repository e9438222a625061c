"""A pytest plugin that slows decode down, to show that the gate catches it: a gate that can't fail is none.

    PYTHONPATH=.ci PYTEST_ADDOPTS="-p planted_slowdown" LOWBIT_PLANTED_SLOWDOWN=10 pytest benches --benchmark-compare

Each decode takes LOWBIT_PLANTED_SLOWDOWN times as long. The environment reaches the fresh processes that confirm a
suspicion, so they see it too.
"""

from __future__ import annotations

import os
import time
from typing import Any

from lowbit.generate import Decoder

FACTOR = float(os.environ["LOWBIT_PLANTED_SLOWDOWN"])


def _synchronize(decoder: Decoder) -> None:
    if decoder.token.is_cuda:
        import torch

        torch.cuda.synchronize(decoder.token.device)


def _slow_down(decode: Any) -> Any:
    def slow(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        _synchronize(self)
        started = time.perf_counter()
        tokens = decode(self, *args, **kwargs)
        _synchronize(self)
        time.sleep((FACTOR - 1) * (time.perf_counter() - started))
        return tokens

    return slow


Decoder.decode = _slow_down(Decoder.decode)  # type: ignore[method-assign]
