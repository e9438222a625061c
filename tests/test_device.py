"""Devices: slugs, dtypes by capability, detection with torch.cuda replaced, versions."""

from __future__ import annotations

import builtins
import importlib.metadata
import platform
import socket
import subprocess
import sys
from types import SimpleNamespace

import fake_pynvml
import pytest
import torch

from lowbit import device
from lowbit.device import Device, detect, environment, slugify
from lowbit.errors import LowbitError
from lowbit.formats import Format

MIB = 1024 * 1024


def gpu(capability):
    return Device("cuda", 0, "A card", "a-card", capability, 16_000.0, 40, "580.1", "13.0")


def row(*dtypes):
    return Format("a16w8", "torch", "cast", 16, 8, dtypes=dtypes)


CPU = Device("cpu", 0, "AMD EPYC", "cpu-amd-epyc-2c", None, 24_000.0, 2, None, None)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H200 MIG 1g.18gb", "nvidia-h200-mig-1g-18gb"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4-40gb"),
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "intel-xeon-platinum-8370c"),
        ("12th Gen Intel(R) Core(TM) i7-1260P", "12th-gen-intel-core-i7-1260p"),
        ("../../etc", "etc"),
        ("®", "unknown"),
    ],
)
def test_slugs_are_plain_and_stable(name, slug):
    assert slugify(name) == slug


@pytest.mark.parametrize(
    ("made", "bf16_first", "fp16_first", "bf16_only"),
    [
        (gpu((7, 5)), "fp16", "fp16", None),
        (gpu((8, 0)), "bf16", "fp16", "bf16"),
        (gpu((9, 0)), "bf16", "fp16", "bf16"),
        (CPU, "bf16", "fp16", "bf16"),
    ],
    ids=["SM75", "SM80", "SM90", "CPU"],
)
def test_the_first_dtype_that_the_device_has(made, bf16_first, fp16_first, bf16_only):
    assert made.dtype_for(row("bf16", "fp16")) == bf16_first
    assert made.dtype_for(row("fp16", "bf16")) == fp16_first
    assert made.dtype_for(row("bf16")) == bf16_only
    assert made.dtype_for(row("fp16")) == "fp16"


def test_sm_and_torch_device():
    assert gpu((9, 0)).sm == "SM90"
    assert gpu((12, 1)).sm == "SM121"
    assert CPU.sm == ""
    assert gpu((9, 0)).torch == torch.device("cuda", 0)
    assert CPU.torch == torch.device("cpu")


# -- detection ----------------------------------------------------------------------------------------------------


def cards(monkeypatch, *names, driver="580.159.04"):
    """Make torch see these cards."""
    fields = {
        "major": 9,
        "minor": 0,
        "total_memory": 143_771 * MIB,
        "multi_processor_count": 132,
        "uuid": fake_pynvml.UUID,
        "pci_bus_id": 0x3B,
        "pci_device_id": 0,
        "pci_domain_id": 0,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=names[i], **fields))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_driver_version", lambda: driver)


def test_a_card_is_read_from_torch(monkeypatch):
    cards(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    assert detect() == fake_pynvml.CARD
    assert (detect(1).slug, detect(1).index) == ("nvidia-l4", 1)


def test_a_torch_that_tells_neither_uuid_nor_bus(monkeypatch):
    cards(monkeypatch, "NVIDIA H200")
    bare = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=MIB, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: bare)
    assert (detect().uuid, detect().pci) == (None, None)


@pytest.mark.parametrize("index", [2, -1])
def test_an_unknown_index_lists_the_known_cards(monkeypatch, index):
    cards(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    expected = rf"unknown device {index}; known: 0 \(NVIDIA H200\), 1 \(NVIDIA L4\), CUDA_VISIBLE_DEVICES='5,7'"
    with pytest.raises(LowbitError, match=expected):
        detect(index)


def test_without_a_card_the_cpu_is_index_0_and_the_only_one(monkeypatch):
    cards(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = detect()
    assert found.kind == "cpu"
    assert found.capability is None
    assert found.slug == f"cpu-{slugify(found.name)}-{found.multiprocessors}c"
    assert socket.gethostname() not in found.slug
    assert found.total_mib is not None
    assert found.total_mib > 100
    with pytest.raises(LowbitError, match=r"unknown device 1; known: 0 \(.+\)$"):
        detect(1)


def test_the_name_of_a_cpu(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9B14\nstepping\t: 1\n")
    assert device._cpu_name(cpuinfo) == "AMD EPYC 9B14"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    assert device._cpu_name(cpuinfo) == "aarch64"
    assert device._cpu_name(tmp_path / "absent") == "aarch64"


# -- driver and versions ------------------------------------------------------------------------------------------


def test_the_driver_by_nvml(monkeypatch):
    fake = fake_pynvml.install(monkeypatch)
    assert device._driver_version() == "580.159.04"
    assert (fake.starts, fake.stops) == (1, 1)


@pytest.mark.parametrize("cause", ["no package", "no NVML"])
def test_the_driver_by_its_kernel_module(monkeypatch, tmp_path, cause):
    fake = fake_pynvml.install(monkeypatch, refused={"nvmlInit"})
    if cause == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    module = tmp_path / "version"
    monkeypatch.setattr(device._kernel_module_version, "__defaults__", (module,))
    assert device._driver_version() is None
    module.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert device._driver_version() == "580.95.05"
    assert fake.stops == 0


def test_environment_tells_versions_without_importing(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        assert name.split(".")[0] not in ("transformers", "torchao", "gemlite", "bitsandbytes", "hqq", "triton"), name
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    told = environment(gpu((9, 0)))
    assert told["torch"] == str(torch.__version__)
    assert told["transformers"] == importlib.metadata.version("transformers")
    assert told["python"] == platform.python_version()
    assert (told["cuda"], told["driver"]) == ("13.0", "580.1")
    assert set(told) >= {"lowbit", "triton", "torchao", "gemlite", "bitsandbytes", "hqq", "os"}
    assert all(isinstance(value, str) and value for value in told.values())
    assert socket.gethostname() not in told["os"].split()


def test_environment_of_a_cpu_and_of_what_is_absent(monkeypatch):
    monkeypatch.setattr(
        device, "PACKAGES", {"nothing": ("lowbit-has-no-such-package",), "numpy": ("absent-too", "numpy")}
    )
    told = environment(CPU)
    assert told["nothing"] == "not installed"
    assert told["numpy"] == importlib.metadata.version("numpy")
    assert (told["cuda"], told["driver"]) == ("none", "none")


@pytest.mark.parametrize("edited", ["backends/torch.py", "kernels/cuda/product.cu"])
def test_edited_code_is_another_environment(tmp_path, edited):
    """Kernels are compiled at first use: their source is code, as Python is; weights and the report's page are not."""
    for name in ("lab.py", edited, "notes.txt", "embedded/model.safetensors", "report/page/vendor/charts.js"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    before = device.source_hash(tmp_path)
    for name in ("notes.txt", "embedded/model.safetensors", "report/page/vendor/charts.js"):
        (tmp_path / name).write_text("a = 2\n")
    assert device.source_hash(tmp_path) == before
    (tmp_path / edited).write_text("a = 2\n")
    assert device.source_hash(tmp_path) != before
    assert environment(CPU)["lowbit_source"] == device.source_hash()


def test_the_commit_is_that_of_lowbits_own_checkout(tmp_path, monkeypatch):
    package = tmp_path / "lowbit"
    package.mkdir()
    monkeypatch.setenv("LOWBIT_COMMIT", "of the image")
    assert device.source_commit(package) == "of the image"
    monkeypatch.delenv("LOWBIT_COMMIT")
    assert device.source_commit(package) == ""  # installed somewhere, not in a checkout of its own
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert device.source_commit(package) == ""
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("LOWBIT_COMMIT", "of an image")
    assert device.source_commit(package) == head
    monkeypatch.setenv("PATH", "")
    assert device.source_commit(package) == ""
