"""``python -m lowbit.gpu_libraries``: install gemlite and hqq where they can run, and say why not where they can't.

gemlite brings 1 GB of Triton and cannot even be imported without a CUDA device, so a machine without an NVIDIA driver
is spared it. tox runs this before the benches; a wheel's metadata can't ask for a driver.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("gemlite", "hqq")
VERSION_FILE = Path("/proc/driver/nvidia/version")


def find_driver(load: Callable[[str], object] = ctypes.CDLL) -> str | None:
    """The NVIDIA driver's version or library name; None where there is no driver.

    The kernel module's version file is enough on bare metal; in a container the management library that the runtime
    mounts tells.
    """
    if VERSION_FILE.is_file():
        return VERSION_FILE.read_text().splitlines()[0].strip()
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            load(name)
        except (OSError, AttributeError):
            continue
        return name
    return None


def missing(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Those of the packages that are not installed."""
    absent = []
    for name in packages:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def main(
    arguments: Sequence[str] | None = None,
    driver: Callable[[], str | None] = find_driver,
    install: Callable[[list[str]], int] = subprocess.call,
) -> int:
    """Install what is missing; the exit code is pip's (0 where nothing was to be done)."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.gpu_libraries", description=__doc__.partition("\n")[0])
    parser.add_argument("--constraints", type=Path, help="pip's constraints file with the versions to take")
    options = parser.parse_args(arguments)
    absent = missing()
    if not absent:
        print(f"lowbit: {' and '.join(PACKAGES)} are installed already")
        return 0
    found = driver()
    if found is None:
        print(f"lowbit: no NVIDIA driver here: {' and '.join(absent)} left out (gemlite brings 1 GB of Triton)")
        return 0
    constraints = ["-c", str(options.constraints)] if options.constraints else []
    print(f"lowbit: NVIDIA driver found ({found}): installing {' and '.join(absent)}", flush=True)
    return install([sys.executable, "-m", "pip", "install", *constraints, *absent])


if __name__ == "__main__":
    sys.exit(main())
