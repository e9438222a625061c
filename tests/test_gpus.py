"""Which GPUs the workers are spread over."""

from __future__ import annotations

import pytest

from lowbit.pytest_plugin import gpus


@pytest.mark.parametrize(
    ("count", "chosen", "expected"),
    [
        (0, None, []),
        (0, "0,1", []),
        (2, None, ["0", "1"]),
        (4, "2,3", ["2", "3"]),
        (4, " 1 , GPU-5f3e", ["1", "GPU-5f3e"]),
        (4, "1,-1,2", ["1"]),
        (2, "0,7", ["0"]),
        (2, "1,1", ["1"]),
        (2, "", []),
    ],
)
def test_visible_devices_reads_what_cuda_would_see(monkeypatch, count, chosen, expected):
    monkeypatch.delenv(gpus.FAKE_DEVICES, raising=False)
    monkeypatch.setattr(gpus, "_count_gpus", lambda: count)
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible_devices() == expected
