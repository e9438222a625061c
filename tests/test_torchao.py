"""torchao's rows: what each is made of, what it needs, and the proofs that need no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from shapes import LLAMA_8B
from torch import nn

from lowbit import backends, truth
from lowbit.backends import NoTruth, coverage, torchao
from lowbit.backends.torchao import configs, needs, static, unpacking
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.quiet import quiet_import

ROWS = [row for row in FORMATS.values() if row.backend == "torchao"]
BF16 = torch.bfloat16
MSLK = "package: needs mslk >= 1.0.0, it is not installed; PyPI has only the placeholder 0.0.0"


def find(name):
    return FORMATS[f"{name}-torchao"]


def tokens(windows=2):
    return torch.randint(0, 512, (windows, 48), generator=torch.Generator().manual_seed(0))


def quantized(fmt, **changes):
    made = tiny.model(num_hidden_layers=1, **changes)
    if fmt.calibration_windows:
        torchao.calibrate(made, fmt, tokens())
    torchao.quantize(made.model.layers[0], fmt, BF16)
    return made


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_rows_of_the_issue_are_there():
    groups = [f"a16w4{hqq}_g{group}" for hqq in ("", "_hqq") for group in (32, 64, 128, 256)]
    intx = [f"a{activation}w{bits}_intx_g32" for activation in (16, 8) for bits in range(1, 9)]
    fp8 = ["a16w8_fp8", "a16w8_fp8_tensor", "a16w8_e5m2", "a8w8_fp8", "a8w8_fp8_tensor", "a8w8_fp8_b128"]
    int8 = ["a16w8", "a16w8_g128", "a8w8", "a8w8_asym", "a8w8_static", "a8w8_fp8_static"]
    mslk = ["a16w4_plain_g128", "a16w4_preshuffled_g128", "a8w4_fp8_g128"]
    uint = ["a16w4_uint_g128", "a16w8_uint", "a8w4_uint_g128", "a8w8_uint"]
    blackwell = ["a8w8_mxfp8", "a4w4_mxfp4", "a8w8_mxfp8_emulated", "a4w4_mxfp4_emulated", "a4w4_nvfp4"]
    others = ["a8w4_g32", "a16w4_nvfp4", "a16w4_nf4"]
    expected = {f"{name}-torchao" for name in groups + intx + fp8 + int8 + mslk + uint + blackwell + others}
    assert {row.id for row in ROWS} == expected


def test_first_choices_are_quick_and_references_full():
    quick = {row.name for row in ROWS if row.suite == "quick"}
    assert quick == {"a16w8", "a8w8", "a16w4_g128", "a16w8_fp8", "a8w8_fp8"}
    assert {row.suite for row in ROWS if not row.fast} == {"full"}
    assert all(row.modes == ("eager", "regional") for row in ROWS if not row.fast)


@pytest.mark.parametrize("fmt", ROWS, ids=lambda row: row.id)
def test_every_scheme_has_a_config_that_leaves_inductor_alone(fmt):
    linear = nn.Linear(256, 256, bias=False, device="meta", dtype=BF16)  # as if on a GPU
    setattr(linear, static.AMAX, 3.0)
    config = configs.make(fmt, linear)
    assert getattr(config, "set_inductor_config", False) is False


def test_configs_say_what_the_rows_say():
    linear = nn.Linear(256, 256, bias=False, device="meta", dtype=BF16)
    made = {row.name: configs.make(row, linear) for row in ROWS if not row.calibration_windows}
    for group in (32, 64, 128, 256):
        plain, hqq = made[f"a16w4_g{group}"], made[f"a16w4_hqq_g{group}"]
        assert (plain.group_size, hqq.group_size) == (group, group)
        assert (plain.int4_choose_qparams_algorithm, hqq.int4_choose_qparams_algorithm) == ("tinygemm", "hqq")
        assert plain.int4_packing_format == "tile_packed_to_4d"
    assert made["a16w4_preshuffled_g128"].int4_packing_format == "preshuffled"
    assert made["a16w8_g128"].granularity.group_size == 128
    assert type(made["a16w8_fp8_tensor"].granularity).__name__ == "PerTensor"
    assert made["a16w8_e5m2"].weight_dtype == torch.float8_e5m2
    assert [type(one).__name__ for one in made["a8w8_fp8"].granularity] == ["PerRow", "PerRow"]
    assert [type(one).__name__ for one in made["a8w8_fp8_tensor"].granularity] == ["PerTensor", "PerTensor"]
    assert [list(one.block_size) for one in made["a8w8_fp8_b128"].granularity] == [[1, 128], [128, 128]]
    assert made["a8w8_asym"].act_mapping_type.name == "ASYMMETRIC"
    assert made["a16w3_intx_g32"].weight_dtype == torch.int3
    assert made["a8w8_mxfp8_emulated"].kernel_preference.name == "EMULATED"
    assert made["a4w4_mxfp4"].kernel_preference.name == "AUTO"
    assert made["a4w4_mxfp4"].weight_dtype == torch.float4_e2m1fn_x2
    assert (made["a8w4_uint_g128"].bit_width, made["a8w4_uint_g128"].group_size) == (4, 128)
    assert (made["a16w8_uint"].bit_width, made["a16w8_uint"].group_size) == (8, None)


# -- what can't run, and why ------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Every package but those named can be found; mslk is not there, and torchao has no CPU kernels of its own."""

    def but(*missing):
        def look(name):
            return None if name in ("mslk", *missing) else SimpleNamespace(submodule_search_locations=[])

        monkeypatch.setattr(backends, "find_spec", look)
        monkeypatch.setattr(needs, "find_spec", look)

    but()
    return but


SM90 = "capability: needs SM100 ({} tensor cores), this is SM90"
ON_AN_H200 = {
    "a16w4_plain_g128": MSLK,
    "a16w4_preshuffled_g128": MSLK,
    "a8w4_fp8_g128": MSLK,
    "a8w8_mxfp8": SM90.format("MXFP8"),
    "a4w4_mxfp4": SM90.format("MXFP4"),
    "a4w4_nvfp4": SM90.format("NVFP4"),
    "a8w4_g32": "capability: needs cpu, this is cuda",
}


def reasons(device, config=LLAMA_8B):
    found = {row.name: backends.unmet(row, device, config) for row in ROWS}
    return {name: str(reason) for name, reason in found.items() if reason}


def test_on_an_h200(installed):
    assert reasons(tiny.gpu(9, 0)) == ON_AN_H200


def test_on_blackwell_mslk_is_all_that_is_missing(installed):
    assert reasons(tiny.gpu(10, 0)) == {name: why for name, why in ON_AN_H200.items() if "SM100" not in why}


def test_on_an_a100_there_is_no_fp8(installed):
    fp8 = "capability: needs SM89 (fp8), this is SM80"
    assert reasons(tiny.gpu(8, 0)) == {
        **{name: why.replace("SM90", "SM80") for name, why in ON_AN_H200.items() if why != MSLK},
        **dict.fromkeys(
            (name for name, why in ON_AN_H200.items() if why == MSLK),
            "capability: needs SM90 (mslk's int4), this is SM80",
        ),
        **dict.fromkeys(("a8w8_fp8", "a8w8_fp8_tensor", "a8w8_fp8_b128", "a8w8_fp8_static"), fp8),
        **dict.fromkeys(("a16w8_fp8", "a16w8_fp8_tensor"), "capability: needs SM89 (fp8 e4m3 in Triton), this is SM80"),
        "a8w4_uint_g128": "capability: needs SM89 (gemlite's fp8 activations), this is SM80",
    }


def test_on_a_cpu(installed):
    cuda = "capability: needs cuda, this is cpu"
    groups = "shape: int4 on a CPU takes group 32, 64, 128, not 256"
    found = reasons(tiny.CPU)
    assert {name for name, why in found.items() if why == cuda} == {
        row.name for row in ROWS if row.devices == ("cuda",)
    }
    assert {name: why for name, why in found.items() if why != cuda} == {
        "a16w4_g256": groups,
        "a16w4_hqq_g256": groups,
        "a8w4_g32": "package: needs torchao's da8w4_linear_cpu, which its wheel has not: build it from source with "
        "USE_CPU_KERNELS=1; a8w4_intx_g32-torchao computes the same as a reference",
    }


def test_the_cpu_kernels_are_looked_for_where_torchao_loads_them(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(needs, "find_spec", lambda name: spec)
    (tmp_path / "_C_cutlass_90a.abi3.so").touch()  # another one
    assert "da8w4_linear_cpu" in str(needs.requirement(find("a8w4_g32"), tiny.CPU, LLAMA_8B))
    (tmp_path / "_C.abi3.so").touch()
    assert needs.requirement(find("a8w4_g32"), tiny.CPU, LLAMA_8B) is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("0.0.0", "package: needs mslk >= 1.0.0, this is 0.0.0; PyPI has only the placeholder 0.0.0"),
        ("1.2.0", "None"),
    ],
)
def test_the_version_of_mslk_counts(monkeypatch, found, reason):
    monkeypatch.setattr(needs, "find_spec", lambda name: object())
    monkeypatch.setattr(needs, "version", lambda name: found)
    assert str(needs.requirement(find("a16w4_plain_g128"), tiny.gpu(9, 0), LLAMA_8B)) == reason
    below = needs.requirement(find("a16w4_plain_g128"), tiny.gpu(8, 9), LLAMA_8B)
    assert str(below) == "capability: needs SM90 (mslk's int4), this is SM89"  # whatever is installed


@pytest.mark.parametrize(
    ("name", "missing", "reason"),
    [
        ("a16w4_uint_g128", "gemlite", 'package: gemlite is not installed; pip install "lowbit[gpu]"'),
        ("a8w8_fp8_b128", "triton", 'package: triton is not installed; pip install "lowbit[gpu]"'),
    ],
)
def test_packages_of_single_schemes(installed, name, missing, reason):
    installed(missing)
    assert str(backends.unmet(find(name), tiny.gpu(9, 0), LLAMA_8B)) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a8w8_fp8_b128", "fp8 blocks need N and K to be multiples of 128: k_proj [32, 256], v_proj [32, 256]"),
        ("a16w4_nf4", "NF4 needs N * K to be a multiple of 16384: k_proj [32, 256], v_proj [32, 256]"),
    ],
)
def test_shapes_that_a_scheme_can_not_take(installed, name, reason):
    assert str(backends.unmet(find(name), tiny.gpu(9, 0), tiny.config(num_key_value_heads=1))) == f"shape: {reason}"


# -- proofs -----------------------------------------------------------------------------------------------------------

FP8_ON_A_CPU = ("a8w8_fp8", "a8w8_fp8_tensor", "a8w8_fp8_static")
"""torch._scaled_mm has a CPU kernel; torchao alone asks for a GPU."""


@pytest.mark.parametrize("name", FP8_ON_A_CPU)
def test_fp8_products_and_their_truth(monkeypatch, name):
    monkeypatch.setattr(quiet_import("torchao.quantization.quant_api"), "_check_hardware_support", lambda kind: None)
    fmt = find(name)
    made = quantized(fmt)
    assert coverage.inspect(made, fmt).bits_per_weight < 8.2
    master = tiny.model(num_hidden_layers=1)
    found = truth.prove(made, fmt, BF16, master)  # rows of zeros included
    assert all(0.01 < one.weight < 0.04 for one in found.values())
    linear, x = made.model.layers[0].mlp.up_proj, torch.randn(3, 256, dtype=BF16)
    seen = torchao.quantize_activations(linear, x)
    assert 0.01 < ((seen - x).norm() / x.norm()).item() < 0.04


def test_without_a_smallest_maximum_a_row_of_zeros_is_nan(monkeypatch):
    """What torchao does by itself, which is why the rows ask for one: if this fails, upstream has mended it."""
    monkeypatch.setattr(quiet_import("torchao.quantization.quant_api"), "_check_hardware_support", lambda kind: None)
    monkeypatch.setattr(configs, "SMALLEST", None)
    linear = quantized(find("a8w8_fp8")).model.layers[0].mlp.up_proj
    assert linear(torch.zeros(1, 1, 256, dtype=BF16)).isnan().all()


@pytest.mark.parametrize(("name", "error"), [("a8w8_mxfp8", 0.027), ("a4w4_mxfp4", 0.118), ("a4w4_nvfp4", 0.095)])
def test_blackwells_weights_and_activations_are_read_back(monkeypatch, name, error):
    workflow = quiet_import("torchao.prototype.mx_formats.inference_workflow")
    monkeypatch.setattr(workflow, "is_sm_at_least_100", lambda: True)
    fmt = find(name)
    made = quantized(fmt)
    original = tiny.model(num_hidden_layers=1).model.layers[0].mlp.up_proj.weight.float()
    linear, x = made.model.layers[0].mlp.up_proj, torch.randn(3, 256, dtype=BF16)
    for seen, want in ((torchao.dequantize(linear), original), (torchao.quantize_activations(linear, x), x)):
        assert ((seen - want).norm() / want.norm()).item() == pytest.approx(error, rel=0.1)
    assert coverage.inspect(made, fmt).linears == 7


def test_asymmetric_int8_is_off_beside_an_outlier_as_its_row_says():
    fmt = find("a8w8_asym")
    found = truth.prove(quantized(fmt), fmt, BF16)
    worst = max(one.kernel for one in found.values())
    assert truth.BOUNDS[BF16] < worst < fmt.options["kernel_bound"]
    assert all("outlier" in one.inputs for one in found.values())
    assert "outlier" in fmt.note
    assert fmt.dtypes == ("bf16",)


@pytest.mark.parametrize("mode", [4, 3], ids=["fused", "shifted"])
def test_weights_packed_for_gemlite_are_read_back(monkeypatch, mode):
    k, n, group = 64, 8, 32
    numbers = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    scale, zero = torch.rand(k // group, n), torch.rand(k // group, n)
    packed = SimpleNamespace(
        qdata=numbers,
        scale=scale,
        zero_point=zero,
        gemlite_kwargs={"in_features": k, "out_features": n, "W_group_mode": mode},
    )

    def unpack_over_rows(data, W_nbits, num_output_rows, dtype):
        assert (W_nbits, num_output_rows, dtype) == (4, k, torch.uint8)
        return data

    bitpack = SimpleNamespace(unpack_over_rows=unpack_over_rows)
    monkeypatch.setattr(unpacking, "quiet_import", lambda name: bitpack)
    by_hand = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            q, s, z = numbers[column, row].float(), scale[column // group, row], zero[column // group, row]
            by_hand[row, column] = q * s + z if mode == 4 else (q - z) * s
    torch.testing.assert_close(unpacking._gemlite(packed), by_hand)


@pytest.mark.parametrize("kind", ["Int4Tensor", "Int4PreshuffledTensor"])
def test_mslks_packings_hide_their_weights(kind):
    weight = type(kind, (), {})()
    with pytest.raises(NoTruth, match=f"torchao's {kind} gives its weights back in no way"):
        unpacking.dequantize(SimpleNamespace(weight=weight))
    with pytest.raises(NoTruth, match=f"torchao's {kind} shows its quantized activations in no way"):
        unpacking.quantize_activations(SimpleNamespace(weight=weight), torch.zeros(1, 4))


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_finds_the_largest_input_of_each_linear():
    fmt, made = find("a8w8_static"), tiny.model()
    torchao.calibrate(made, fmt, tokens())
    seen = []
    hook = made.model.layers[1].mlp.gate_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max().item())
    )
    with torch.no_grad():
        for window in tokens():
            made.model(input_ids=window[None])
    hook.remove()
    assert made.model.layers[1].mlp.gate_proj.calibrated_amax == max(seen)
    assert made.model.layers[1].mlp.up_proj.calibrated_amax == max(seen)  # the same input
    assert made.model.layers[0].mlp.gate_proj.calibrated_amax != max(seen)
    assert not any(linear._forward_pre_hooks for linear in made.modules())


@pytest.mark.parametrize("name", ["a8w8_static", "a8w8_fp8_static"])
def test_the_calibrated_scale_is_what_activations_are_clipped_by(name):
    fmt, made = find(name), tiny.model(num_hidden_layers=1)
    torchao.calibrate(made, fmt, tokens())
    amax = made.model.layers[0].mlp.down_proj.calibrated_amax
    torchao.quantize(made.model.layers[0], fmt, BF16)
    linear = made.model.layers[0].mlp.down_proj
    x = torch.full((1, 768), 2 * amax, dtype=BF16)
    assert torchao.quantize_activations(linear, x).max().item() == pytest.approx(amax, rel=0.005)
    assert not hasattr(linear, "calibrated_amax")


def test_static_scales_need_a_calibrated_model():
    with pytest.raises(LowbitError, match="a8w8_static-torchao: static activation scales need a calibrated model"):
        torchao.quantize(tiny.model().model.layers[0], find("a8w8_static"), BF16)


def test_a_calibration_that_is_not_finite_is_refused():
    made = tiny.model()
    made.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LowbitError, match="calibrating down_proj expected a finite input, got a maximum of nan"):
        torchao.calibrate(made, find("a8w8_static"), tokens())
    assert not any(linear._forward_pre_hooks for linear in made.modules())


def test_an_unknown_scheme_lists_every_known_one():
    with pytest.raises(LowbitError, match=r"unknown torchao scheme 'int5'; known: fp8_dynamic, .*, uintx_weight_only"):
        torchao.quantize(tiny.model(), Format("a16w5", "torchao", "int5", 16, 5), BF16)


@pytest.mark.parametrize("name", ["a8w8_mxfp8_emulated", "a4w4_mxfp4_emulated", "a16w4_nvfp4"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_head_takes_the_last_row_of_a_prompt(name, batch):
    made = tiny.model()
    torchao.quantize(made, replace(find(name), targets=("lm_head",)), BF16)
    ids = torch.arange(batch * 5).view(batch, 5)
    with torch.no_grad():
        last = made(input_ids=ids, logits_to_keep=1).logits
        every = made(input_ids=ids).logits
    assert last.shape == (batch, 1, made.config.vocab_size)
    assert torch.equal(last, every[:, -1:])
