"""Which device this is, what it can do, and what stands around it: name, slug, capability, versions."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import lowbit
from lowbit import vram_limit
from lowbit.errors import LowbitError
from lowbit.formats import Format

MIB = 1024 * 1024
SOURCE = Path(__file__).parent
CODE = (".py", ".cu")
"""What of the package decides what runs; CUDA sources are compiled at first use."""
BF16_CAPABILITY = (8, 0)
"""First CUDA capability with bf16 arithmetic (Ampere; CUDA C++ Programming Guide). Below, torch only emulates it."""

PACKAGES = {
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    **{
        name: (name,)
        for name in (
            "transformers",
            "tokenizers",
            "torchao",
            "gemlite",
            "bitsandbytes",
            "hqq",
            "numpy",
            "pytest-benchmark",
        )
    },
}
"""What a result may depend on → the names that its distribution goes by."""


@dataclass(frozen=True)
class Device:
    """One device. ``slug`` names it for ever and everywhere: model of the card or processor, never the host.

    ``index`` counts the devices that CUDA_VISIBLE_DEVICES leaves. ``uuid`` and ``pci`` (``0000:3b:00.0``) let NVML
    find the same card. ``total_mib`` is the card's memory, or the host's where the device is the CPU; LOWBIT_VRAM_MIB,
    which ``limit_mib`` holds, makes it smaller.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    slug: str
    capability: tuple[int, int] | None
    total_mib: float | None
    multiprocessors: int
    driver: str | None
    cuda: str | None
    uuid: str | None = None
    pci: str | None = None
    limit_mib: float | None = None

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @property
    def sm(self) -> str:
        """``SM90``; empty for a CPU."""
        return "" if self.capability is None else f"SM{self.capability[0]}{self.capability[1]}"

    def has_dtype(self, dtype: str) -> bool:
        """Whether the device computes in ``bf16``, ``fp16`` or ``fp32``. A CPU does, be it slowly."""
        return dtype != "bf16" or self.capability is None or self.capability >= BF16_CAPABILITY

    def dtype_for(self, fmt: Format) -> str | None:
        """The first of the format's base dtypes that this device has: SM75 has no bf16. None: it has none of them."""
        return next((dtype for dtype in fmt.dtypes if self.has_dtype(dtype)), None)


def slugify(name: str) -> str:
    """``NVIDIA H200 MIG 1g.18gb`` → ``nvidia-h200-mig-1g-18gb``; marks (R), (TM) and a clock rate say nothing."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*$", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def detect(index: int = 0) -> Device:
    """The ``index``-th CUDA device that CUDA_VISIBLE_DEVICES leaves; where torch sees none, the CPU, which is index 0.

    Raises LowbitError naming the devices that there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= index < max(count, 1):
        known = [f"{i} ({torch.cuda.get_device_name(i)})" for i in range(count)] or [f"0 ({_cpu_name()})"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
        raise LowbitError(f"unknown device {index}; known: {', '.join(known)}{seen}")
    return _cuda_device(index) if count else _cpu_device()


def of(device: torch.device) -> Device:
    """What this torch device is. Raises LowbitError naming the devices that there are."""
    if device.type == "cpu":
        return _cpu_device()
    return detect(torch.cuda.current_device() if device.index is None else device.index)


def _cuda_device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    uuid = str(getattr(properties, "uuid", "")) or None
    bus = getattr(properties, "pci_bus_id", None)  # not in every torch
    limit = vram_limit.read()
    pci = None if bus is None else f"{properties.pci_domain_id:04x}:{bus:02x}:{properties.pci_device_id:02x}.0"
    return Device(
        kind="cuda",
        index=index,
        name=properties.name,
        slug=slugify(properties.name),
        capability=(properties.major, properties.minor),
        total_mib=min(properties.total_memory / MIB, limit or math.inf),
        multiprocessors=properties.multi_processor_count,
        driver=_driver_version(),
        cuda=torch.version.cuda,
        uuid=uuid,
        pci=pci,
        limit_mib=limit,
    )


def _cpu_device() -> Device:
    name, cores = _cpu_name(), _cpu_count()
    slug = f"cpu-{slugify(name)}-{cores}c"
    limit, host = vram_limit.read(), _host_mib()
    total = limit if host is None else min(host, limit or math.inf)
    return Device("cpu", 0, name, slug, None, total, cores, driver=None, cuda=None, limit_mib=limit)


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()  # Arm's cpuinfo has no name, other systems no cpuinfo


def _cpu_count() -> int:
    """Cores this process may use: taskset and a container's cpuset count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_mib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
    except (AttributeError, ValueError, OSError):
        return None  # not a POSIX system


def _driver_version() -> str | None:
    """The NVIDIA driver, ``580.159.04``; None where neither NVML nor the kernel module tells."""
    try:
        import pynvml
    except ImportError:
        return _kernel_module_version()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return _kernel_module_version()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _kernel_module_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.exists() else None
    return found[0] if found else None


def environment(device: Device) -> dict[str, str]:
    """What the numbers depend on besides the device: versions, by metadata alone (importing gemlite needs a GPU).

    ``lowbit_source`` tells edited code apart under one version, so that runs of both never share a baseline.
    """
    versions = {name: _version(distributions) for name, distributions in PACKAGES.items()}
    return {
        "lowbit": lowbit.__version__,
        "lowbit_source": source_hash(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **versions,
        "cuda": device.cuda or "none",
        "driver": device.driver or "none",
        "os": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip(),
        **({"CUDA_LAUNCH_BLOCKING": "1"} if launch_blocking() else {}),
        **({vram_limit.VARIABLE: f"{device.limit_mib:g}"} if device.limit_mib else {}),
    }


def launch_blocking(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the host waits for each kernel before it launches the next (CUDA_LAUNCH_BLOCKING): no timing holds.

    Asked of the environment alone, so that one rule holds on every machine: a run under the variable is never judged.
    """
    return environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def source_hash(root: Path = SOURCE) -> str:
    """12 hex digits over the names and contents of every Python file and CUDA source of the package.

    Not of its data (the embedded model and its text), nor of the report's page.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in CODE):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def source_commit(root: Path = SOURCE) -> str:
    """The git commit of the checkout that lowbit runs from; empty where it is installed, or git does not tell.

    An image has no ``.git``: there LOWBIT_COMMIT tells, which the Dockerfile takes as a build argument.
    """
    if not (root.parent / ".git").exists():
        return os.environ.get("LOWBIT_COMMIT", "")
    try:
        command = ["git", "-C", str(root.parent), "rev-parse", "--verify", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or another user's checkout
        return ""
