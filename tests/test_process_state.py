"""Process-wide settings come back after a case, whatever it did; graph breaks and recompiles are counted."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU

from lowbit import compilers, process_state
from lowbit.formats import FORMATS
from lowbit.quiet import quiet_import


def snapshot():
    import torch._functorch.config

    configs = (torch._inductor.config, torch._dynamo.config, torch._functorch.config)
    return (
        [config.get_config_copy() for config in configs],
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        list(warnings.filters),
    )


def flip_everything():
    quantization = pytest.importorskip("torchao.quantization.utils")
    quantization.recommended_inductor_config_setter()
    torch._inductor.config.triton.cudagraphs = True
    torch._dynamo.config.recompile_limit = 3
    torch._functorch.config.donated_buffer = not torch._functorch.config.donated_buffer
    torch.set_default_dtype(torch.float16)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def test_every_setting_comes_back():
    before = snapshot()
    with process_state.preserved_state():
        flip_everything()
        changed = snapshot()
    assert snapshot() == before
    assert all(then != now for then, now in zip(before, changed, strict=True))


def test_settings_come_back_after_a_failure():
    def fail():
        flip_everything()
        raise RuntimeError("out of memory")

    before = snapshot()
    with pytest.raises(RuntimeError, match="out of memory"), process_state.preserved_state():
        fail()
    assert snapshot() == before


def test_a_precision_set_by_its_new_name_comes_back():
    matmul = torch.backends.cuda.matmul
    with process_state.preserved_state():
        matmul.fp32_precision = "tf32"
        with process_state.preserved_state():
            matmul.fp32_precision = "ieee"
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_gemlites_settings_come_back(monkeypatch):
    autotune = type("AUTOTUNE", (), {"GEMV": "fast", "USE_CUDA_GRAPH": False})
    config = SimpleNamespace(AUTOTUNE=autotune, KERNEL_CACHE=SimpleNamespace(ENABLE=False), WARP_SPECIALIZE=False)
    linear = type("GemLiteLinearTriton", (), {"PACKING_BITWIDTH": 32})
    core = SimpleNamespace(
        GEMLITE_TRITON_CONFIG_CACHE={"GEMV": 1}, GEMLITE_ACC_DTYPE={1: 2}, GemLiteLinearTriton=linear
    )
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    monkeypatch.setitem(sys.modules, "gemlite.triton_kernels.config", config)
    quantizers = SimpleNamespace(GEMLITE_ENABLE_PTX_FP4_PACK=True)
    monkeypatch.setitem(sys.modules, "gemlite.quant_utils", quantizers)
    with process_state.preserved_state():
        autotune.GEMV, autotune.USE_CUDA_GRAPH = "max", True
        config.KERNEL_CACHE.ENABLE = True
        core.GEMLITE_ACC_DTYPE[1] = 3
        core.GEMLITE_TRITON_CONFIG_CACHE = {}
        linear.PACKING_BITWIDTH = 8
        quantizers.GEMLITE_ENABLE_PTX_FP4_PACK = False
    assert quantizers.GEMLITE_ENABLE_PTX_FP4_PACK
    assert (autotune.GEMV, autotune.USE_CUDA_GRAPH, config.KERNEL_CACHE.ENABLE) == ("fast", False, False)
    assert (core.GEMLITE_ACC_DTYPE, core.GEMLITE_TRITON_CONFIG_CACHE) == ({1: 2}, {"GEMV": 1})
    assert linear.PACKING_BITWIDTH == 32


def test_recompiles_and_graph_breaks_are_counted(monkeypatch):
    compile_fx = quiet_import("torch._inductor.compile_fx")
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **kwargs: graph.forward)

    def breaking(x):
        torch._dynamo.graph_break()
        return x + 1

    with process_state.preserved_state():
        compiled = compilers.compile_call(torch.square, "default", CPU, {})
        compiled(torch.ones(2))
        compiled(torch.ones(2))
        assert process_state.counters() == (0, 0)
        compiled(torch.ones(3))
        compiled(torch.ones(4))
        assert process_state.counters() == (0, 2)
        assert process_state.compiled_graphs() == 3
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compilers.compile_call(breaking, "default", CPU, {})(torch.ones(2))
        torch.compile(breaking, backend="eager")(torch.ones(2))
        assert process_state.counters().graph_breaks == 1
        process_state.reset_counters()
        assert process_state.counters() == (0, 0)
        assert process_state.cudagraph_skips() == 0


def test_a_graph_is_compiled_anew_once_and_then_found_in_the_cache(tmp_path, monkeypatch):
    if unmet := compilers.unmet("default", CPU, FORMATS["bf16-torch"]):
        pytest.skip(str(unmet))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for anew in (1, 0):
        with process_state.preserved_state():
            compilers.compile_call(torch.square, "default", CPU, {})(torch.ones(5))
            assert process_state.compiled_anew() == anew
