"""Which GPUs there are, and which of them, with which processors, each worker of ``-n K`` gets."""

from __future__ import annotations

import os

import pytest

from lowbit.pytest_plugin import cores

Place = tuple[str | None, list[int]]
"""A worker's entry of CUDA_VISIBLE_DEVICES (None on a CPU) and its processors (none: all)."""

FAKE_DEVICES = "LOWBIT_FAKE_DEVICES"
"""Environment variable: pretend that this many GPUs are there, for tests of the workers on a machine without."""


def visible_devices() -> list[str]:
    """The GPUs that CUDA would see, as entries of CUDA_VISIBLE_DEVICES. Asks NVML: CUDA itself stays untouched."""
    fake = os.environ.get(FAKE_DEVICES)
    if fake is not None:
        return [str(index) for index in range(int(fake))]
    count = _count_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or count == 0:
        return [str(index) for index in range(count)]
    devices: list[str] = []
    for entry in (word.strip() for word in chosen.split(",")):
        # CUDA stops at the first entry that names no device.
        if not (entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < count)) or entry in devices:
            break
        devices.append(entry)
    return devices


def _count_gpus() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def claim(config: pytest.Config) -> tuple[list[str], list[Place]]:
    """The GPUs that are there, and a place for each worker of ``-n`` or ``--tx``.

    Raises pytest.UsageError where two workers would share a GPU, and for what benches can't be spread by.
    """
    from xdist.workermanage import parse_tx_spec_config

    option, asked = config.option, parse_tx_spec_config(config)
    visible = visible_devices()
    if len(asked) > max(1, len(visible)):
        have = "no GPU, and workers on one CPU disturb" if not visible else f"{len(visible)}; they would disturb"
        raise pytest.UsageError(
            f"-n {len(asked)}: benches need a GPU for each worker, this machine has {have} each other's timing; "
            f"leave -n out, or give -n {max(1, len(visible))}, or -n auto"
        )
    if option.dist == "each":
        raise pytest.UsageError(
            "--dist each: a bench is measured once; leave --dist out, its cases are spread by format"
        )
    if any(str(place).split("//")[0] != "popen" for place in asked):
        raise pytest.UsageError(
            f"--tx: benches run in workers of this machine (popen), got {', '.join(map(str, asked))}"
        )
    if getattr(option, "lowbit_device", None) is not None:
        raise pytest.UsageError(
            "--lowbit-device with -n: each worker has a GPU of its own; choose them with CUDA_VISIBLE_DEVICES=0,1"
        )
    devices: list[str | None] = list(visible[: len(asked)]) or [None]
    parts = cores.shares(len(devices)) or [[] for _ in devices]
    return visible, list(zip(devices, parts, strict=True))
