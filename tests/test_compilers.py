from __future__ import annotations

import re
import stat

import pytest
import torch
from tiny import CPU, gpu, model

from lowbit import backends, compilers, process_state
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, recipes
from lowbit.quiet import quiet_import

BF16 = FORMATS["bf16-torch"]
LLM_INT8 = FORMATS["a8w8_llmint8-bitsandbytes"]
INT8_DYNAMIC_HEAD = {"lm_head": "a8w8-torchao", "layers.*": "a16w8-torchao"}
COMPILED = [mode for mode in compilers.MODES if mode not in ("eager", "native")]


def double(x):
    return x + x


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
    with process_state.preserved_state():
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
        ("a16w4_nvfp4-lowbit", gpu(8, 9), None),
        (
            "a16w4_g32-lowbit",
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


@pytest.mark.parametrize("name", ["a16w8-torchao", "a16w4_g128-torchao", "a16w4_nf4_dq-bitsandbytes"])
def test_a_quantized_layer_compiles_whole(name):
    fmt = FORMATS[name]
    layer = model(num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=4).model.layers[0]
    backends.get(fmt.backend).quantize(layer, fmt, torch.bfloat16)
    x = torch.randn(1, 1, 128, dtype=torch.bfloat16)
    with torch.no_grad(), process_state.preserved_state():
        want = layer.mlp(x)
        got = compilers.compile_call(lambda x: layer.mlp(x), "default", CPU, fmt.inductor)(x)
        assert process_state.counters() == (0, 0)
        assert process_state.compiled_graphs() == 1
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.02


def test_regional_wants_the_layers():
    with pytest.raises(LowbitError, match="'regional' expects the decoder layers"):
        compilers.compile_call(double, "regional", CPU, {})


def test_what_a_cpus_compiler_lacks_is_said():
    emulated = FORMATS["a8w8_mxfp8_emulated-torchao"]
    assert str(compilers.unmet("regional", CPU, emulated)).startswith("capability: regional needs cuda: on a CPU torch")
    assert compilers.unmet("eager", CPU, emulated) is None
    assert compilers.unmet("regional", gpu(9, 0), emulated) is None


def test_a_product_that_needs_more_rows_is_not_compiled_for_fewer():
    card = Device("cuda", 0, "A card", "a-card", (9, 0), 1000.0, 1, None, None)
    int8_dynamic = FORMATS["a8w8-torchao"]
    unmet = compilers.unmet("reduce-overhead", card, int8_dynamic, 1)
    assert str(unmet) == "shape: its compiled product needs 17 tokens per forward pass, this case has 1"
    assert compilers.unmet("reduce-overhead", card, int8_dynamic, 512) is None
    assert compilers.unmet("eager", card, int8_dynamic, 1) is None


@pytest.mark.parametrize(
    ("parts", "rows", "head_rows", "reason"),
    [
        (INT8_DYNAMIC_HEAD, 512, 1, "its compiled lm_head (a8w8-torchao) needs 17 tokens per forward pass, this"),
        (INT8_DYNAMIC_HEAD, 1, 1, "its compiled product needs 17 tokens per forward pass, this case has 1"),
        (INT8_DYNAMIC_HEAD, 17 * 512, 17, ""),
        ({"*": "a8w8-torchao"}, 512, 1, "its compiled lm_head (a8w8-torchao) needs 17 tokens per forward pass, this"),
        ({"layers.*": "a8w8-torchao"}, 512, 1, ""),
        ({"lm_head": "a16w8-torchao", "layers.*": "a8w8-torchao"}, 512, 1, ""),
    ],
)
@pytest.mark.parametrize("mode", COMPILED)
def test_a_head_that_needs_more_rows_than_it_sees_is_not_compiled(mode, parts, rows, head_rows, reason):
    fmt = recipes.make(recipes.Recipe("mine", parts), FORMATS)
    unmet = compilers.unmet(mode, gpu(9, 0), fmt, rows, head_rows)
    assert (unmet is not None) == bool(reason)
    assert reason in str(unmet)
    assert unmet is None or unmet.kind == "shape"
    assert compilers.unmet("eager", gpu(9, 0), fmt, rows, head_rows) is None
    assert compilers.unmet(mode, CPU, fmt, rows, head_rows) is None
