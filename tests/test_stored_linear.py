"""Checkpoints of compressed-tensors with 8-bit elements: their weights bit for bit, their inputs by the definition."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
import tiny_llama
import torch
from published import Plain, publish_plain

from lowbit import backends, checkpoint, formats, models, quantized, truth
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, stored
from lowbit.formats.layouts import Inputs
from lowbit.kernels import stream_modules, weights
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stored_linear import DEFINITION, INTEGER, SCALED, StoredLinear, cpu_multiplies_fp8

CPU = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
ROWS = torch.tensor([[1], [9], [0.1]])
IDS = torch.arange(24).view(2, 12) * 5 % 128
SCHEMES = {
    "fp8_dynamic": Plain("float", "row", "dynamic"),
    "fp8_static": Plain("float", "tensor", "static"),
    "fp8_static_fp32": Plain("float", "row", "static", scales=torch.float32),
    "fp8_block": Plain("float", "block", "group"),
    "fp8_weights": Plain("float", "row"),
    "int8_dynamic": Plain("int", "row", "dynamic", scales=torch.float32),
    "int8_static": Plain("int", "tensor", "static"),
    "int8_asymmetric_inputs": Plain("int", "row", "asymmetric"),
    "int8_weights": Plain("int", "row"),
    "int8_asymmetric": Plain("int", "row", symmetric=False, scales=torch.float16),
    "int8_g64": Plain("int", 64, scales=torch.float16),
}
NAMES = {
    "fp8_dynamic": "a8w8_ct_fp8_dynamic",
    "fp8_static": "a8w8_ct_fp8_static",
    "fp8_static_fp32": "a8w8_ct_fp8_static",
    "fp8_block": "a8w8_ct_fp8_dynamic_block128",
    "fp8_weights": "a16w8_ct_fp8",
    "int8_dynamic": "a8w8_ct_int8_dynamic",
    "int8_static": "a8w8_ct_int8_static",
    "int8_asymmetric_inputs": "a8w8_ct_int8_dynamic",
    "int8_weights": "a16w8_ct_int8",
    "int8_asymmetric": "a16w8_ct_int8",
    "int8_g64": "a16w8_ct_int8_g64",
}

pytestmark = pytest.mark.usefixtures("same_formats")


def choose(folder: Path) -> models.Choice:
    return models.choose(str(folder), "auto", CPU, {})


def row_of(choice: models.Choice) -> formats.Format:
    how = stored.read(choice.config, "a test")
    assert how is not None
    return formats.find(stored.as_row(how).id)


def seen(x: torch.Tensor, scheme: Plain) -> torch.Tensor:
    """Inputs [m, k] as the scheme has them, token by token in Python's own arithmetic."""
    rows = []
    for row in x.float().unflatten(-1, (-1, 128 if scheme.inputs == "group" else x.shape[1])).flatten(0, 1):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        if scheme.inputs == "static":
            scale, zero = 1 / 16, 0.0
        elif scheme.inputs == "asymmetric":
            scale = (high - low) / 255
            zero = round(min(max(-128 - low / scale, -128), 127))
        else:
            scale, zero = max(-low, high) / (127.5 if scheme.kind == "int" else 448), 0.0
        codes = row / scale + zero
        limit = (-128, 127) if scheme.kind == "int" else (-448, 448)
        codes = codes.clamp(*limit)
        codes = codes.round() if scheme.kind == "int" else codes.to(torch.float8_e4m3fn).float()
        rows.append((codes - zero) * scale)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_weights_are_the_published_ones_and_inputs_are_as_defined(tmp_path, name):
    scheme = SCHEMES[name]
    made = publish_plain(tmp_path, scheme)
    choice = choose(tmp_path)
    row = row_of(choice)
    assert row.id == f"{NAMES[name]}-checkpoint"
    host = models.load(choice)
    before = host.checksum()
    found = quantized.build(host, row, CPU)
    assert found.coverage.linears == found.coverage.expected == 14
    plain = quantized.build(host, FORMATS["bf16-torch"], CPU).model
    for path, weight in made.weights.items():
        module = found.model.get_submodule(path)
        assert torch.equal(backends.get("checkpoint").dequantize(module), weight), path
        assert torch.equal(plain.get_submodule(path).weight, weight.bfloat16()), path
        if scheme.inputs:
            x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)) * ROWS
            got, want = backends.get("checkpoint").quantize_activations(module, x), seen(x, scheme)
            assert (got - want).norm() <= 1e-3 * want.norm(), path  # a code on the edge may round the other way
            assert truth.measure(module, row, torch.bfloat16).kernel < truth.BOUNDS[torch.bfloat16]
        else:
            assert not isinstance(module, StoredLinear)
    logits, reference = (each(IDS, use_cache=False).logits for each in (found.model, plain))
    assert torch.isfinite(logits).all()
    if scheme.inputs:
        assert not torch.equal(logits, reference)
    else:
        assert (logits - reference).norm() < 0.05 * reference.norm()
    assert host.checksum() == before


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("fp8_dynamic", SCALED),
        ("fp8_static", SCALED),
        ("fp8_block", DEFINITION),
        ("int8_dynamic", INTEGER),
        ("int8_static", INTEGER),
        ("int8_asymmetric_inputs", DEFINITION),
    ],
)
@torch.no_grad()
def test_products_of_8_bit_operands_are_those_of_the_definition(tmp_path, name, kernel, monkeypatch):
    publish_plain(tmp_path, SCHEMES[name])
    choice = choose(tmp_path)
    row = row_of(choice)
    found = quantized.build(models.load(choice), row, CPU)
    if kernel == SCALED and torch.__version__ < "2.13" and not cpu_multiplies_fp8():  # by the definition, and said so
        kernel = DEFINITION
    assert found.coverage.kernels == f"{kernel} (14)"
    linear = found.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    got = linear(x)
    assert got.dtype == torch.bfloat16
    monkeypatch.setattr(StoredLinear, "kernel", lambda self, dtype: DEFINITION)
    assert (got - linear(x)).float().norm() <= 2**-8 * got.float().norm()


def test_a_token_of_zeros_and_fp16_inputs():
    packed = quantize(torch.randn(32, 64), "fp8_e4m3")
    linear = StoredLinear(packed, inputs=Inputs("float", dynamic=True))
    assert linear(torch.zeros(1, 64, dtype=torch.bfloat16)).abs().sum() == 0
    assert linear.kernel(torch.float16) == DEFINITION  # torch._scaled_mm with a scale per row gives bf16 alone
    assert linear(torch.ones(1, 64, dtype=torch.float16)).dtype == torch.float16
    biased = StoredLinear(packed, torch.ones(32, dtype=torch.bfloat16), inputs=Inputs("float", dynamic=True))
    assert torch.equal(biased(torch.zeros(1, 64, dtype=torch.bfloat16)), torch.ones(1, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize(("name", "scheme"), [("fp8_weights", "fp8_e4m3"), ("int8_weights", "int8")])
@torch.no_grad()
def test_weights_alone_in_8_bits_feed_the_decode_kernels_with_an_8_bit_head(tmp_path, name, scheme):
    made = publish_plain(tmp_path, SCHEMES[name], hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
    choice = choose(tmp_path)
    row = formats.find(f"{NAMES[name]}_head8-checkpoint")
    assert (row.scheme, row.fast) == (scheme, True)
    assert "native" in row.modes
    found = quantized.build(models.load(choice), row, CPU)
    assert found.coverage.linears == found.coverage.expected == 15
    assert stream_modules.attach(found.model, lambda linear: linear.packed) == 15
    for path, weight in made.weights.items():
        assert torch.equal(weights.dequantize(found.model.get_submodule(path).packed), weight), path


def scale_of(tensors, path, value):
    tensors[f"{path}.input_scale"] = torch.tensor([value])


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fp8_static", lambda t: t.pop("model.layers.0.mlp.up_proj.input_scale"), "up_proj.input_scale is missing"),
        ("fp8_static", lambda t: scale_of(t, "model.layers.0.mlp.up_proj", 0.0), "input_scale above 0, got 0.0"),
        ("fp8_static", lambda t: scale_of(t, "model.layers.0.mlp.up_proj", torch.nan), "expected finite scales"),
        (
            "fp8_dynamic",
            lambda t: t["model.layers.1.mlp.up_proj.weight"].view(torch.uint8).fill_(0x7F),
            "up_proj: expected finite weights, got NaN",
        ),
        (
            "int8_g64",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(256, 2)}),
            r"weight_scale expected \[256, 2\] in float16 or bfloat16, got \[256, 2\] in float32",
        ),
        (
            "int8_weights",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_zero_point": torch.ones(256, 1).to(torch.int8)}),
            "symmetric, which has zero points of 128, got 129",
        ),
        (
            "fp8_dynamic",
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight is in float8_e4m3fn, which its config says nothing of",
        ),
        ("fp8_dynamic", lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}), "1 unexpected"),
        (
            "int8_weights",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].half()}),
            r"up_proj.weight expected \[256, 128\] in int8, got \[256, 128\] in float16",
        ),
    ],
)
def test_a_wrong_checkpoint_says_what_is_wrong(tmp_path, name, change, expected):
    publish_plain(tmp_path, SCHEMES[name])
    tiny_llama.edit_weights(tmp_path, change)
    with pytest.raises(LowbitError, match=expected):
        models.load(choose(tmp_path))


@pytest.mark.parametrize(
    ("name", "part", "changes", "expected"),
    [
        ("fp8_dynamic", "weights", {"num_bits": 4}, r"bits=4 \(expected one of 8\)"),
        ("fp8_dynamic", "weights", {"type": "int"}, r"type='int' \(expected 'float' in float-quantized\)"),
        ("fp8_dynamic", "weights", {"symmetric": False}, "symmetric=False of float weights"),
        ("fp8_dynamic", "weights", {"dynamic": True}, "dynamic weights"),
        ("fp8_dynamic", "weights", {"strategy": "tensor_group"}, "strategy='tensor_group'"),
        (
            "fp8_dynamic",
            "weights",
            {"strategy": "group", "group_size": 64},
            r"group_size=64 \(expected -1 or",
        ),
        ("fp8_dynamic", "weights", {"strategy": "group"}, "strategy='group' without group_size"),
        ("fp8_block", "weights", {"block_structure": [64, 64]}, r"block_structure=\[64, 64\] of float"),
        ("int8_weights", "weights", {"actorder": "group"}, "actorder='group' of unpacked weights"),
        ("fp8_dynamic", "input_activations", {"num_bits": 4}, r"num_bits=4 \(expected 8 bits, a float symmetric\)"),
        ("fp8_dynamic", "input_activations", {"symmetric": False}, "a float symmetric"),
        ("fp8_dynamic", "input_activations", {"strategy": "tensor"}, r"strategy='tensor', dynamic=True \(expected"),
        ("fp8_dynamic", "input_activations", {"dynamic": False}, r"strategy='token', dynamic=False \(expected"),
        ("fp8_block", "input_activations", {"group_size": 256}, r"group_size=256 \(expected one of 32, 64, 128\)"),
    ],
)
def test_an_option_that_is_not_read_names_itself(name, part, changes, expected):
    values = published.plain_config(SCHEMES[name])
    values["config_groups"]["group_0"][part] |= changes
    with pytest.raises(LowbitError, match=expected):
        checkpoint.make_config({"model_type": "llama", "quantization_config": values}, "config.json")


WHERE = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("format", "kind"), [("fp8_e4m3", "float"), ("int8", "int")])
@torch.no_grad()
def test_any_number_of_rows_on_any_device(where, rows, dynamic, format, kind):
    """A GPU's torch._int_mm wants more than 16 rows, its torch._scaled_mm sizes in multiples of 16."""
    generator = torch.Generator().manual_seed(rows)
    packed = quantize(torch.randn(96, 64, generator=generator), format)
    scale = None if dynamic else torch.tensor([1 / 16])
    linear = StoredLinear(packed, inputs=Inputs(kind, dynamic), input_scale=scale).to(where)
    x = torch.randn(1, rows, 64, generator=generator).bfloat16().to(where)
    want = linear.quantize_inputs(x[0]).values() @ linear.defined().T
    assert linear(x).shape == (1, rows, 96)
    assert (linear(x)[0].float() - want).norm() <= 2**-8 * want.norm()


@pytest.mark.parametrize("broken", ["refused", "wrong"])
def test_a_torch_without_fp8_products_per_row_on_a_cpu_gets_the_definition(monkeypatch, broken):
    def scaled_mm(left, right, **options):
        if broken == "refused":
            raise RuntimeError("Scaling is not implemented on this CPU")
        return torch.ones(left.shape[0], right.shape[1], dtype=torch.bfloat16)

    cpu_multiplies_fp8.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", scaled_mm)
        assert not cpu_multiplies_fp8()
        linear = StoredLinear(quantize(torch.randn(32, 64), "fp8_e4m3"), inputs=Inputs("float", dynamic=True))
        assert linear.kernel(torch.bfloat16) == DEFINITION
        assert linear(torch.randn(1, 2, 64).bfloat16()).isfinite().all()
    cpu_multiplies_fp8.cache_clear()


@torch.no_grad()
def test_quantized_inputs_compile_as_one_graph():
    linear = StoredLinear(quantize(torch.randn(32, 64), "fp8_e4m3"), inputs=Inputs("float", dynamic=True))
    linear.settle()
    x = torch.randn(1, 2, 64).bfloat16()
    compiled = torch.compile(linear, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(compiled(x), linear(x))
