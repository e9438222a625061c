from __future__ import annotations

import re
import stat
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, gpu, model

from lowbit import backends, compilers
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.quiet import quiet_import

BF16 = FORMATS["bf16-torch"]
LLM_INT8 = FORMATS["a8w8_llmint8-bitsandbytes"]


def double(x):
    return x + x


# -- modes -------------------------------------------------------------------------------------------------------------


def test_the_modes_are_there():
    assert list(compilers.MODES) == [
        "eager",
        "default",
        "reduce-overhead",
        "max-autotune-no-cudagraphs",
        "max-autotune",
        "native",
        "regional",
    ]
    inductor = {mode.inductor for mode in compilers.MODES.values()} - {None}
    assert inductor <= set(torch._inductor.list_mode_options())
    for mode in compilers.MODES.values():
        if mode.inductor and not mode.regional:
            options = torch._inductor.list_mode_options(mode.inductor)
            assert options.get("triton.cudagraphs", False) == mode.cuda_graph


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(LowbitError, match="unknown compile mode 'fast'; known: default, eager, max-autotune"):
        compilers.find("fast")


def test_a_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    assert str(compilers.unmet("default", CPU, BF16)).startswith("package: torch.compile on a CPU needs a C++ compiler")
    assert compilers.unmet("eager", CPU, BF16) is None
    monkeypatch.setenv("CXX", "/opt/bin/c++")
    assert compilers.unmet("default", CPU, BF16) is None


def test_what_waits_for_the_host_has_no_cuda_graph():
    h200 = gpu(9, 0)
    refused = {mode for mode in compilers.MODES if compilers.unmet(mode, h200, LLM_INT8)}
    assert refused == {"reduce-overhead", "max-autotune", "regional"}
    assert "outlier columns" in str(compilers.unmet("regional", h200, LLM_INT8))
    assert not any(compilers.unmet(mode, h200, BF16) for mode in compilers.MODES)
    assert "needs SM75" in str(compilers.unmet("default", gpu(7, 0), BF16))


# -- caches ------------------------------------------------------------------------------------------------------------


def test_caches_are_kept_below_the_users_cache(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    told = compilers.configure_caches(environ)
    assert told == {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "lowbit/inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "lowbit/triton"),
        "TRITON_CACHE_AUTOTUNING": "1",
    }
    assert told.items() <= environ.items()
    assert (tmp_path / "lowbit/inductor").is_dir()


def test_the_users_own_caches_win(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "/mine", "TRITON_CACHE_AUTOTUNING": "0"}
    told = compilers.configure_caches(environ)
    assert told["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert told["TRITON_CACHE_AUTOTUNING"] == "0"


def test_without_a_place_for_caches_it_says_so(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch(mode=stat.S_IRUSR)
    with pytest.warns(UserWarning, match="can't keep compiled kernels in .*set T"):
        assert compilers.configure_caches({"XDG_CACHE_HOME": str(blocked)}) == {"TRITON_CACHE_AUTOTUNING": "1"}


# -- process-wide state ------------------------------------------------------------------------------------------------


def process_state():
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
    before = process_state()
    with compilers.preserved_state():
        flip_everything()
        changed = process_state()
    assert process_state() == before
    assert all(then != now for then, now in zip(before, changed, strict=True))


def test_settings_come_back_after_a_failure():
    def fail():
        flip_everything()
        raise RuntimeError("out of memory")

    before = process_state()
    with pytest.raises(RuntimeError, match="out of memory"), compilers.preserved_state():
        fail()
    assert process_state() == before


def test_a_precision_set_by_its_new_name_comes_back():
    matmul = torch.backends.cuda.matmul
    with compilers.preserved_state():
        matmul.fp32_precision = "tf32"
        with compilers.preserved_state():
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
    with compilers.preserved_state():
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


# -- compiling ---------------------------------------------------------------------------------------------------------


def test_eager_is_the_function_itself():
    assert compilers.compile_call(double, "eager", CPU, {"coordinate_descent_tuning": True}) is double


@pytest.mark.parametrize("mode", [mode for mode in compilers.MODES if mode not in ("eager", "native", "regional")])
def test_flags_of_mode_and_format_reach_the_compile_alone(monkeypatch, mode):
    compile_fx = quiet_import("torch._inductor.compile_fx")
    seen = []

    def spy(graph, inputs, config_patches=None, **kwargs):
        seen.append(config_patches)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    with compilers.preserved_state():
        before = torch._inductor.config.get_config_copy()
        compiled = compilers.compile_call(double, mode, CPU, {"force_fuse_int_mm_with_mul": True})
        assert seen == []
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
        assert torch._inductor.config.get_config_copy() == before
    want = {**torch._inductor.list_mode_options(mode), "force_fuse_int_mm_with_mul": True}
    assert [{name: patches[name] for name in want} for patches in seen] == [want]


def test_the_native_mode_is_for_gpus_and_captures_the_prefill(monkeypatch):
    monkeypatch.setattr("lowbit.regional.GraphedCall", lambda fn: ("captured", fn))
    h200, row = gpu(9, 0), FORMATS["a16w4_g128-lowbit"]
    assert compilers.unmet("native", h200, row) is None
    assert str(compilers.unmet("native", CPU, row)) == "capability: needs cuda (lowbit's own kernels), this is cpu"
    assert compilers.compile_call(double, "native", h200, {}) == ("captured", double)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("a16w4_g128-lowbit", gpu(8, 0), None),
        ("a16w4_g128-lowbit", gpu(12, 0), None),
        ("a16w4_g32-lowbit", gpu(9, 0), None),
        (
            "a16w4_g128-lowbit",
            gpu(9, 0),
            "reduce-overhead compiles no streamed weights, which SM90 has here: mode native",
        ),
        (
            "a16w4_g128-lowbit",
            CPU,
            r"reduce-overhead needs cuda for lowbit's rows \(their kernels in its graph\), this is cpu",
        ),
    ],
)
def test_our_own_rows_are_compiled_where_their_kernels_are_custom_ops(monkeypatch, name, device, reason):
    monkeypatch.setattr("lowbit.kernels.nvrtc.available", lambda: None)
    unmet = compilers.unmet("reduce-overhead", device, FORMATS[name])
    assert unmet is None if reason is None else re.search(reason, str(unmet))
    assert "reduce-overhead" in FORMATS[name].modes


def test_without_nvrtc_nothing_is_streamed(monkeypatch):
    monkeypatch.setattr("lowbit.kernels.nvrtc.available", lambda: "not installed")
    assert compilers.unmet("reduce-overhead", gpu(9, 0), FORMATS["a16w4_g128-lowbit"]) is None


def test_an_unknown_flag_is_refused():
    with pytest.raises(RuntimeError, match="Unexpected optimization option no_such_flag"):
        compilers.compile_call(double, "default", CPU, {"no_such_flag": True})


def test_recompiles_and_graph_breaks_are_counted(monkeypatch):
    compile_fx = quiet_import("torch._inductor.compile_fx")
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **kwargs: graph.forward)

    def breaking(x):
        torch._dynamo.graph_break()
        return x + 1

    with compilers.preserved_state():
        compiled = compilers.compile_call(double, "default", CPU, {})
        compiled(torch.ones(2))
        compiled(torch.ones(2))
        assert compilers.counters() == (0, 0)
        compiled(torch.ones(3))
        compiled(torch.ones(4))
        assert compilers.counters() == (0, 2)
        assert compilers.compiled_graphs() == 3
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compilers.compile_call(breaking, "default", CPU, {})(torch.ones(2))
        torch.compile(breaking, backend="eager")(torch.ones(2))
        assert compilers.counters().graph_breaks == 1
        compilers.reset_counters()
        assert compilers.counters() == (0, 0)
        assert compilers.cudagraph_skips() == 0


@pytest.mark.parametrize("name", ["a16w8-torchao", "a16w4_g128-torchao", "a16w4_nf4_dq-bitsandbytes"])
def test_a_quantized_layer_compiles_whole(name):
    fmt = FORMATS[name]
    layer = model(num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=4).model.layers[0]
    backends.get(fmt.backend).quantize(layer, fmt, torch.bfloat16)
    x = torch.randn(1, 1, 128, dtype=torch.bfloat16)
    with torch.no_grad(), compilers.preserved_state():
        want = layer.mlp(x)
        got = compilers.compile_call(lambda x: layer.mlp(x), "default", CPU, fmt.inductor)(x)
        assert compilers.counters() == (0, 0)
        assert compilers.compiled_graphs() == 1
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.02


def test_regional_wants_the_layers():
    with pytest.raises(LowbitError, match="'regional' expects the decoder layers"):
        compilers.compile_call(double, "regional", CPU, {})


def test_a_product_that_needs_more_rows_is_not_compiled_for_fewer():
    card = Device("cuda", 0, "A card", "a-card", (9, 0), 1000.0, 1, None, None)
    int8_dynamic = FORMATS["a8w8-torchao"]
    unmet = compilers.unmet("reduce-overhead", card, int8_dynamic, 1)
    assert str(unmet) == "shape: its compiled product needs 17 tokens per forward pass, this case has 1"
    assert compilers.unmet("reduce-overhead", card, int8_dynamic, 512) is None
    assert compilers.unmet("eager", card, int8_dynamic, 1) is None
