"""What is asked of the CUDA driver, by a driver that only writes it down."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels import launch
from lowbit.kernels.nvrtc import Binary


class Code(int):
    name = "CUDA_ERROR_INVALID_VALUE"


class FakeDriver:
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="carveout",
    )
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="overlap",
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster",
    )

    def __init__(self):
        self.code, self.prepared, self.launched = Code(0), [], []

    def CUlaunchConfig(self):
        return SimpleNamespace(attrs=[], numAttrs=0)

    def CUlaunchAttribute(self):
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuModuleLoadData(self, cubin):
        return self.code, ("module", cubin)

    def cuModuleGetFunction(self, module, name):
        return self.code, name

    def cuFuncSetAttribute(self, function, attribute, value):
        self.prepared.append((function, attribute, value))
        return (self.code,)

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        argument = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))[0]
        self.launched.append((config, function, ctypes.c_int.from_address(argument).value))
        return (self.code,)


class Argument(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int)]


@pytest.fixture
def driver(monkeypatch):
    found = FakeDriver()
    monkeypatch.setattr(launch, "_driver", lambda: found)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return found


NAMES = {"product_kernel<HIDDEN>": "mangled", "embed_kernel": "embed", "attention_kernel<3>": "attention"}


def test_a_kernel_is_launched_on_torchs_stream_with_its_argument(driver):
    module = launch.Module(Binary(b"cubin", NAMES))
    module.launch("product_kernel<HIDDEN>", (128, 1), 288, Argument(41), shared_bytes=1000, overlap=True)
    module.launch("embed_kernel", (16, 1), 256, Argument(42))
    (config, function, value), (plain, embed, other) = driver.launched
    assert (function, value, embed, other) == (b"mangled", 41, b"embed", 42)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX) == (128, 1, 1, 288)
    assert (config.sharedMemBytes, config.hStream) == (1000, 7)
    assert [one.id for one in config.attrs] == ["overlap"]
    assert config.numAttrs == 1
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert (plain.attrs, plain.numAttrs) == ([], 0)
    largest = [
        (b"mangled", "carveout", 100),
        (b"mangled", "shared", launch.MAX_SHARED_BYTES),
        (b"embed", "carveout", 100),
    ]
    assert driver.prepared == largest


def test_blocks_of_a_cluster_are_launched_together(driver):
    module = launch.Module(Binary(b"cubin", NAMES))
    module.launch("attention_kernel<3>", (8, 8), 256, Argument(1), shared_bytes=1000, overlap=True, cluster=8)
    ((config, function, _),) = driver.launched
    assert function == b"attention"
    assert (config.gridDimX, config.gridDimY, config.sharedMemBytes) == (8, 8, 1000)
    assert [one.id for one in config.attrs] == ["cluster", "overlap"]
    assert vars(config.attrs[0].value.clusterDim) == {"x": 1, "y": 8, "z": 1}
    assert config.numAttrs == 2


def test_the_bindings_own_structures_hold_both_attributes(monkeypatch):
    real = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    module = object.__new__(launch.Module)
    module._driver = real
    config = module._config((8, 8), 256, 1000, 8, True)
    cluster, overlap = config.attrs
    assert config.numAttrs == 2
    assert cluster.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z) == (1, 8, 1)
    assert overlap.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert overlap.value.programmaticStreamSerializationAllowed == 1


def test_the_drivers_refusal_names_the_kernel(driver):
    module = launch.Module(Binary(b"cubin", NAMES))
    module.function("embed_kernel")
    driver.code = Code(1)
    with pytest.raises(LowbitError, match="failed while launching embed_kernel: CUDA_ERROR_INVALID_VALUE"):
        module.launch("embed_kernel", (1, 1), 32, Argument(0))
