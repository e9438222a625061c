from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from shapes import LLAMA_8B
from tiny import CPU, config, gpu, model

from lowbit import backends
from lowbit.backends import coverage
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, LINEARS, Format

# rows that take the head too, and recipes: tests/test_native.py, tests/test_recipes.py
OTHERS = [row for row in FORMATS.values() if row.targets == LINEARS and not row.parts]
CPU_ROWS = [row for row in OTHERS if "cpu" in row.devices]
TINY_ROWS = [row for row in CPU_ROWS if backends.unmet(row, CPU, config()) is None]  # K is 256 and 768 there
QUICK = [row for row in OTHERS if row.suite == "quick"]  # further rows: the tests of their library
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STORIES = SimpleNamespace(
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=512,
    tie_word_embeddings=True,
)


@pytest.fixture
def installed(monkeypatch):
    """Every package can be found, or all but those named."""

    def but(*missing):
        monkeypatch.setattr(backends, "find_spec", lambda name: None if name in missing else object())

    but()
    return but


def quantized(fmt, dtype):
    made = model(dtype)
    if fmt.calibration_windows:
        backends.get(fmt.backend).calibrate(made, fmt, torch.arange(64).view(2, 32))
    for layer in made.model.layers:
        backends.get(fmt.backend).quantize(layer, fmt, dtype)
    return made


# -- quantizing --------------------------------------------------------------------------------------------------------

# Relative error of the logits in libraries_on_cpu.md (hidden 256, 4 layers), measured there per scheme. Half of it
# would be too good to be quantized, twice of it is a broken kernel.
LOGIT_ERROR = {
    "cast": 0.0057,
    "int8_weight_only": 0.0192,
    "int8_dynamic": 0.0229,
    "int4_weight_only": 0.2545,
    "fp8_weight_only": 0.0654,
    "llm_int8": 0.0215,
    "nf4": 0.2152,
    "int8_static": 0.0389,  # measured with this model
    "mx_dynamic": 0.0797,
    "nvfp4_weight_only": 0.2447,
    "nf4_weight_only": 0.2245,
    # by row, where a scheme has several widths
    "a16w8_e5m2-torchao": 0.1500,
    "a4w4_mxfp4_emulated-torchao": 0.3486,
    **{
        f"a{activation}w{bits}_intx_g32-torchao": error
        for activation in (16, 8)
        for bits, error in enumerate((1.3732, 0.9955, 0.5374, 0.2200, 0.1072, 0.0562, 0.0297, 0.0186), start=1)
    },
    # lowbit's own, measured with this model
    "mxfp6_e3m2": 0.1222,
    "mxfp6_e2m3": 0.0699,
    "fp6_e3m2_row": 0.1221,
    "fp6_e2m3_row": 0.0587,
    "mxfp6_e3m2_dynamic": 0.1692,
    "mxfp6_e2m3_dynamic": 0.0864,
    "int4_dynamic": 0.3375,
    "ternary_dynamic": 1.1661,
    "binary_dynamic": 1.2071,
}


KNOWN = [row for row in TINY_ROWS if {row.scheme, row.id} & set(LOGIT_ERROR) or row in QUICK]


@pytest.mark.parametrize("fmt", KNOWN, ids=lambda fmt: fmt.id)
def test_a_row_quantizes_its_linears_and_nothing_else(fmt):
    dtype = DTYPES[fmt.dtypes[0]]
    ids = torch.arange(32).view(2, 16)
    before = torch._inductor.config.get_config_copy(), torch._dynamo.config.get_config_copy(), torch.get_default_dtype()
    reference, tested = model(), quantized(fmt, dtype)
    is_quantized = backends.get(fmt.backend).is_quantized
    for path, module in tested.named_modules():
        if path.rsplit(".", 1)[-1] in LINEARS:
            assert is_quantized(module)
            assert not module.training
        elif fmt.quantized:
            assert not is_quantized(module)
    with torch.no_grad():
        want, got = reference(ids).logits.float(), tested(ids).logits
    assert got.dtype == dtype
    error = ((got.float() - want).norm() / want.norm()).item()
    floor = 0.5 if fmt.quantized else 0.0
    expected = LOGIT_ERROR.get(fmt.id) or LOGIT_ERROR.get(fmt.scheme)
    assert expected, f"say in LOGIT_ERROR what error {fmt.scheme} should have: here {fmt.id} has {error:.4f}"
    assert floor * expected <= error <= 2 * expected
    assert coverage.inspect(tested, fmt).linears == 14
    after = torch._inductor.config.get_config_copy(), torch._dynamo.config.get_config_copy(), torch.get_default_dtype()
    assert after == before


@pytest.mark.parametrize("fmt", [row for row in TINY_ROWS if row.quantized], ids=lambda fmt: fmt.id)
def test_quantizing_twice_is_refused(fmt):
    tested = quantized(fmt, torch.bfloat16)
    with pytest.raises(LowbitError, match=r"expects plain linears, but q_proj is a .*fresh copy of the master"):
        backends.get(fmt.backend).quantize(tested.model.layers[0], fmt, torch.bfloat16)


def test_quantizing_leaves_the_source_weights_alone():
    for fmt in TINY_ROWS:
        made = model()
        if fmt.calibration_windows:
            backends.get(fmt.backend).calibrate(made, fmt, torch.arange(32).view(1, 32))
        weights = [layer.self_attn.q_proj.weight.data for layer in made.model.layers]
        copies = [weight.clone() for weight in weights]
        for layer in made.model.layers:
            backends.get(fmt.backend).quantize(layer, fmt, torch.bfloat16) if fmt.quantized else None
        assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies, strict=True)), fmt.id


def test_a_cast_row_refuses_the_wrong_dtype():
    with pytest.raises(LowbitError, match=r"fp16-torch expects q_proj in torch\.float16, got torch\.bfloat16"):
        backends.get("torch").quantize(model(), FORMATS["fp16-torch"], torch.float16)


@pytest.mark.parametrize("backend", ["torchao", "bitsandbytes"])
def test_an_unknown_scheme_lists_the_known_ones(backend):
    with pytest.raises(LowbitError, match=r"unknown .* scheme 'int5'; known: "):
        backends.get(backend).quantize(model(), Format("a16w5", backend, "int5", 16, 5), torch.bfloat16)


def test_an_unknown_backend_lists_the_known_ones():
    known = r"bitsandbytes, .*, lowbit, .*reference, .*torch, torchao"
    with pytest.raises(LowbitError, match=rf"unknown backend 'awq'; known: {known}"):
        backends.get("awq")


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_backend_is_complete(name):
    backend = backends.get(name)
    assert isinstance(backend.PACKAGES, tuple)
    assert all(callable(getattr(backend, verb)) for verb in ("requirement", "quantize", "is_quantized"))


# -- what can't run, and why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "device", "reason"),
    [
        ("bf16-torch", gpu(7, 5), "capability: needs SM80 (bf16), this is SM75"),
        ("a16w4_g128-torchao", gpu(7, 5), "capability: needs SM80 (bf16), this is SM75"),
        ("a8w8_fp8-torchao", gpu(8, 0), "capability: needs SM89 (fp8), this is SM80"),
        ("a16w8_fp8-torchao", gpu(8, 6), "capability: needs SM89 (fp8 e4m3 in Triton), this is SM86"),
        ("a8w8_fp8-gemlite", gpu(8, 0), "capability: needs SM89 (fp8), this is SM80"),
        ("a16w8-gemlite", gpu(7, 0), "capability: needs SM75 (Triton), this is SM70"),
        ("a8w8_llmint8-bitsandbytes", gpu(7, 0), "capability: needs SM75 (int8 tensor cores), this is SM70"),
        ("a16w8-gemlite", CPU, "capability: needs cuda, this is cpu"),
        ("a8w8_fp8-torchao", CPU, "capability: needs cuda, this is cpu"),
    ],
)
def test_capability_names_what_is_needed_and_what_is_there(installed, fmt, device, reason):
    assert str(backends.unmet(FORMATS[fmt], device, LLAMA_8B)) == reason


def test_without_bf16_the_other_dtype_is_taken(installed):
    turing = gpu(7, 5)
    runs = {row.id for row in QUICK if backends.unmet(row, turing, LLAMA_8B) is None}
    assert all("fp16" in FORMATS[name].dtypes for name in runs)
    assert runs >= {
        "fp16-torch",
        "a16w8-torchao",
        "a8w8-torchao",
        "a16w8-gemlite",
        "a16w4_g128-gemlite",
        "a8w8_llmint8-bitsandbytes",
        "a16w4_nf4_dq-bitsandbytes",
    }


def test_every_quick_row_runs_on_an_h200_in_the_8b_shape(installed):
    h200 = gpu(9, 0, total_mib=143_771)
    assert [row.id for row in QUICK if backends.unmet(row, h200, LLAMA_8B)] == []


@pytest.mark.parametrize(
    ("fmt", "missing", "reason"),
    [
        ("a16w8-gemlite", "gemlite", 'package: gemlite is not installed; pip install "lowbit[gpu]"'),
        ("a16w4_g128-gemlite", "hqq", 'package: hqq is not installed; pip install "lowbit[hqq]"'),
        ("a16w8-torchao", "torchao", 'package: torchao is not installed; pip install "lowbit"'),
        ("a16w4_nf4_dq-bitsandbytes", "bitsandbytes", 'package: bitsandbytes is not installed; pip install "lowbit"'),
    ],
)
def test_a_missing_package_names_the_command(installed, fmt, missing, reason):
    installed(missing)
    assert str(backends.unmet(FORMATS[fmt], gpu(9, 0), LLAMA_8B)) == reason
    if missing == "hqq":
        assert backends.unmet(FORMATS["a16w8-gemlite"], gpu(9, 0), LLAMA_8B) is None


@pytest.mark.parametrize(
    ("fmt", "device", "reason"),
    [
        (
            "a16w4_g128-torchao",
            CPU,
            "shape: group 128 does not divide q_proj (K=64), k_proj (K=64), v_proj (K=64), o_proj (K=64), "
            "gate_proj (K=64), up_proj (K=64), down_proj (K=172)",
        ),
        ("a16w4_nf4_dq-bitsandbytes", CPU, "shape: group 64 does not divide down_proj (K=172)"),
        ("a16w8-gemlite", gpu(9, 0), "shape: gemlite's step 32 does not divide down_proj (K=172)"),
        (
            "a8w8-torchao",
            gpu(9, 0),
            "shape: cuBLAS int8 products need N and K to be multiples of 8: "
            "gate_proj [172, 64], up_proj [172, 64], down_proj [64, 172]",
        ),
    ],
)
def test_shape_names_the_linears(installed, fmt, device, reason):
    assert str(backends.unmet(FORMATS[fmt], device, STORIES)) == reason


def test_rows_without_a_group_run_on_any_shape(installed):
    for name in ("bf16-torch", "a16w8-torchao", "a8w8-torchao", "a8w8_llmint8-bitsandbytes"):
        assert backends.unmet(FORMATS[name], CPU, STORIES) is None


def test_a_card_that_is_too_small(installed):
    small = gpu(9, 0, total_mib=8_192, name="a small card")
    reason = backends.unmet(FORMATS["bf16-torch"], small, LLAMA_8B)
    assert reason is not None
    assert str(reason) == "memory: weights take about 15,316 MiB, a small card has 8,192 MiB"
    assert backends.unmet(FORMATS["a16w4_g128-torchao"], small, LLAMA_8B) is None


def test_shapes_cover_the_head_when_a_row_names_it():
    row = Format("a16w8", "torchao", "int8_weight_only", 16, 8, targets=(*LINEARS, "lm_head"))
    found = {shape.name: (shape.n, shape.k) for shape in backends.shapes(row, LLAMA_8B)}
    assert found["lm_head"] == (128256, 4096)
    assert found["k_proj"] == (1024, 4096)
    assert found["down_proj"] == (4096, 14336)
    with pytest.raises(LowbitError, match="unknown target linear of a16w8-torchao 'router'"):
        backends.shapes(Format("a16w8", "torchao", "x", 16, 8, targets=("router",)), LLAMA_8B)


def test_asking_imports_no_library():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from types import SimpleNamespace\n"
        "from tiny import CPU, gpu\n"
        "from lowbit import backends, formats\n"
        f"config = SimpleNamespace(**{vars(LLAMA_8B)!r})\n"
        "reasons = [backends.unmet(row, d, config) for row in formats.FORMATS.values() for d in (CPU, gpu(9, 0))]\n"
        "assert any(reasons)\n"
        "print(sorted({'torchao', 'bitsandbytes', 'gemlite', 'hqq', 'triton', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_the_tiny_config_is_what_the_quick_rows_need(installed):
    assert [row.id for row in CPU_ROWS if row in QUICK and backends.unmet(row, CPU, config())] == []
