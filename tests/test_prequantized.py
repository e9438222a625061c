"""Checkpoints that GPTQ, AWQ and compressed-tensors publish: read bit for bit, run, or refused by what is wrong."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path

import published
import pytest
import tiny_llama
import torch
from published import Scheme, publish
from torch import nn

from lowbit import backends, checkpoint, formats, kernels, models, packed_file, quantized, stored_layouts
from lowbit.backends import native
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, LINEARS, stored
from lowbit.generate import Generator
from lowbit.kernels import geometry, stream_modules, weights
from lowbit.kernels.modules import NativeLinear
from lowbit.kernels.stored_linear import StoredLinear

CPU = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
SCHEMES = {
    "gptq_g128": Scheme("gptq", 4, 128, True),
    "gptq_v2_g32": Scheme("gptq", 4, 32, False, version=2),
    "gptq_asymmetric": Scheme("gptq", 4, 64, False),
    "gptq_3": Scheme("gptq", 3, 32, False),
    "gptq_2": Scheme("gptq", 2, 64, True, version=2),
    "gptq_8_row": Scheme("gptq", 8, -1, True),
    "awq_g64": Scheme("awq", 4, 64, False),
    "ct_g32": Scheme("compressed-tensors", 4, 32, True, scales=torch.bfloat16),
    "ct_g128": Scheme("compressed-tensors", 4, 128, True),
    "ct_asymmetric": Scheme("compressed-tensors", 4, 64, False, version=2, scales=torch.bfloat16),
    "ct_asymmetric_int8": Scheme("compressed-tensors", 4, 64, False, scales=torch.bfloat16),
    "ct_8_row": Scheme("compressed-tensors", 8, -1, True, scales=torch.bfloat16),
    "gptq_act": Scheme("gptq", 4, 64, True, ordered=True),
    "gptq_act_3": Scheme("gptq", 3, 32, False, version=2, ordered=True),
    "ct_act": Scheme("compressed-tensors", 4, 32, True, scales=torch.bfloat16, ordered=True),
}
IDS = torch.arange(24).view(2, 12) * 5 % 128

pytestmark = pytest.mark.usefixtures("same_formats")


def choose(folder: Path, load_format: str = "auto") -> models.Choice:
    return models.choose(str(folder), load_format, CPU, {})


def row_of(choice: models.Choice) -> formats.Format:
    how = stored.read(choice.config, "a test")
    assert how is not None
    return formats.find(stored.as_row(how).id)


class Exact(nn.Module):
    """y = x · Wᵀ in fp32, given in x's dtype: what a packed linear is defined to do."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.kept = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.kept.T).to(x.dtype)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_weights_and_logits_are_those_of_the_published_layout(tmp_path, name):
    made = publish(tmp_path, SCHEMES[name])
    choice = choose(tmp_path)
    row = row_of(choice)
    host = models.load(choice)
    before = host.checksum()
    found = quantized.build(host, row, CPU)
    assert found.coverage.linears == found.coverage.expected == 14
    packed = {path: module for path, module in found.model.named_modules() if isinstance(module, NativeLinear)}
    assert packed.keys() == made.weights.keys()
    for path, module in packed.items():
        assert torch.equal(backends.get("checkpoint").dequantize(module), made.weights[path]), path
    plain = quantized.build(host, FORMATS["bf16-torch"], CPU).model
    reference = copy.deepcopy(plain)
    for path, weight in made.weights.items():
        assert torch.equal(plain.get_submodule(path).weight, weight.bfloat16()), path
        reference.set_submodule(path, Exact(weight))
    logits, wanted = (each(IDS, use_cache=False).logits for each in (found.model, reference))
    if SCHEMES[name].ordered:  # sums of fp32 products in another order, rounded to bf16
        assert (logits - wanted).norm() < 0.004 * wanted.norm()
    else:
        assert torch.equal(logits, wanted)
    assert (logits - plain(IDS, use_cache=False).logits).norm() < 0.05 * logits.norm()
    assert host.checksum() == before
    assert host.parameters == choice.parameters


def test_what_a_scheme_is_called_and_takes(tmp_path):
    publish(tmp_path, SCHEMES["gptq_g128"])
    choice = choose(tmp_path)
    row = row_of(choice)
    assert row.id == "a16w4_gptq_g128-checkpoint"
    assert {"int4", "gptq", "W4A16", "g128", "checkpoint"} <= row.selectors
    coverage = quantized.build(models.load(choice), row, CPU).coverage
    assert coverage.bits_per_weight == 4 + 16 / 128  # fp16 scales and nothing else: the zero point is always 8
    assert "14" in (coverage.kernels or "")
    awq = publish(tmp_path / "awq", SCHEMES["awq_g64"]).folder
    assert row_of(choose(awq)).id == "a16w4_awq_g64-checkpoint"


def test_every_storage_can_hold_what_is_read():
    for bits in {bits for known in stored.BITS.values() for bits in known}:
        for group in (*stored.GROUPS, None):
            row = weights.find(f"int{bits}_zp_g{group}" if group else f"int{bits}_zp")
            assert (row.bits, row.group_size, row.scale, row.zero) == (bits, group, torch.float32, torch.float32)


def test_act_order_keeps_each_groups_columns_side_by_side(tmp_path):
    publish(tmp_path, SCHEMES["gptq_act"])
    choice = choose(tmp_path)
    row = row_of(choice)
    assert (row.id, row.modes) == ("a16w4_gptq_g64_act-checkpoint", ("eager",))
    made = quantized.build(models.load(choice), row, CPU)
    linear = made.model.model.layers[0].mlp.down_proj
    assert isinstance(linear, StoredLinear)
    where = published.column_groups(256, SCHEMES["gptq_act"])
    assert where[linear.order.long()].tolist() == sorted(where.tolist())
    assert stream_modules.attach(made.model, native._streamable) == 0  # no decode kernel knows the order
    with pytest.raises(LowbitError, match=r"has columns in another order \(act-order\) or inputs in 8 bits"):
        packed_file.save(made.model, tmp_path / "packed.safetensors")


def uneven(tensors):
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].clone().fill_(1)


def test_groups_of_several_sizes_are_refused(tmp_path):
    publish(tmp_path, SCHEMES["gptq_act"])
    tiny_llama.edit_weights(tmp_path, uneven)
    with pytest.raises(LowbitError, match=r"4 groups of 64 columns, got \[0, 256, 0, 0\] columns"):
        models.load(choose(tmp_path))


@pytest.mark.parametrize("name", ["gptq_act", "ct_act"])
def test_an_order_that_is_not_there_is_missing(tmp_path, name):
    publish(tmp_path, SCHEMES[name])
    part = "g_idx" if name == "gptq_act" else "weight_g_idx"
    tiny_llama.edit_weights(tmp_path, lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj.{part}"))
    with pytest.raises(LowbitError, match=f"up_proj.{part} is missing"):
        models.load(choose(tmp_path))


def test_a_quantized_head_is_read_too(tmp_path):
    scheme = SCHEMES["gptq_g128"]
    publish(tmp_path, scheme)
    published.edit_quantization(tmp_path, lm_head=True)
    kept = {}

    def quantize_head(tensors):
        codes, zero, scale = published.quantize(tensors.pop("lm_head.weight"), scheme)
        kept["head"] = (codes - zero) * scale.float()
        parts = published.tensors(codes, zero, scale, scheme)
        tensors.update({f"lm_head.{name}": part.contiguous() for name, part in parts.items()})

    tiny_llama.edit_weights(tmp_path, quantize_head)
    choice = choose(tmp_path)
    found = quantized.build(models.load(choice), row_of(choice), CPU)
    assert found.coverage.linears == 15
    assert found.format.id == "a16w4_gptq_g128_head-checkpoint"
    assert torch.equal(found.model.lm_head.dequantize(), kept["head"])
    plain = quantized.build(models.load(choice), FORMATS["bf16-torch"], CPU).model
    assert torch.equal(plain.lm_head.weight, kept["head"].bfloat16())


def test_what_lowbit_packs_of_a_plain_model_stays_packed(tmp_path):
    tiny_llama.save(tmp_path, **published.SHAPE)
    found = quantized.build(models.load(choose(tmp_path)), FORMATS["a16w4_sym_g128-lowbit"], CPU)
    assert found.coverage.linears == 15
    assert isinstance(found.model.model.layers[0].mlp.up_proj, NativeLinear)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_with_a_head_in_4_bits_the_decode_kernels_can_stream_it(tmp_path, scales):
    made = publish(
        tmp_path,
        Scheme("compressed-tensors", 4, 128, True, scales=scales),
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    choice = choose(tmp_path)
    row = formats.find("a16w4_ct_g128_head4-checkpoint")
    assert row.fast
    assert "native" in row.modes
    assert geometry.unmet(choice.config, row.scheme, (9, 0)) is None
    host = models.load(choice)
    found = quantized.build(host, row, CPU)
    assert found.coverage.linears == found.coverage.expected == 15
    own = weights.dequantize(kernels.quantize(host.master.lm_head.weight.to(torch.float16), "int4_sym_g128"))
    assert torch.equal(found.model.lm_head.dequantize(), own)
    stream_modules.attach(found.model, lambda linear: linear.packed)
    for path, weight in made.weights.items():
        assert torch.equal(weights.dequantize(found.model.get_submodule(path).packed), weight), path


def test_scales_beyond_fp16_keep_their_bits_and_the_decode_kernels_are_refused(tmp_path):
    publish(tmp_path, Scheme("compressed-tensors", 4, 128, True, scales=torch.bfloat16))
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tiny_llama.edit_weights(tmp_path, lambda tensors: tensors[name].fill_(1.2e-7))
    choice = choose(tmp_path)
    host = models.load(choice)
    found = quantized.build(host, row_of(choice), CPU).model.model.layers[1].mlp.down_proj
    assert torch.equal(found.packed.scale, torch.full((128, 2), 1.2e-7, dtype=torch.bfloat16).float())
    with pytest.raises(LowbitError, match=r"needs every linear in int4_sym_g128, but .* take the row without _head4"):
        quantized.build(host, formats.find("a16w4_ct_g128_head4-checkpoint"), CPU)


def test_biases_stay_with_their_linears(tmp_path):
    made = publish(tmp_path, SCHEMES["ct_g32"], attention_bias=True)
    choice = choose(made.folder)
    host = models.load(choice)
    packed, plain = (quantized.build(host, row, CPU).model for row in (row_of(choice), FORMATS["bf16-torch"]))
    bias = host.master.model.layers[0].self_attn.q_proj.bias
    for model in (packed, plain):
        assert torch.equal(model.model.layers[0].self_attn.q_proj.bias.float(), bias.float().to(torch.bfloat16).float())


def test_a_generator_takes_the_checkpoint_as_it_is(tmp_path):
    publish(tmp_path, SCHEMES["awq_g64"])
    generator = Generator.from_model(tmp_path, None, device="cpu")
    assert isinstance(generator.model.model.layers[0].mlp.up_proj, NativeLinear)
    assert len(list(islice(generator([1, 2, 3], 4, stop_at_eos=False), 4))) == 4
    generator.save(tmp_path / "packed.safetensors")
    again = Generator.from_packed(tmp_path / "packed.safetensors")
    assert [token.id for token in again([1, 2, 3], 4)] == [token.id for token in generator([1, 2, 3], 4)]


# -- other formats on it, and it on other models -----------------------------------------------------------------------


def test_other_formats_are_told_that_it_is_quantized_already(tmp_path):
    publish(tmp_path, SCHEMES["gptq_g128"])
    choice = choose(tmp_path)
    runs = {row.id for row in FORMATS.values() if backends.unmet(row, CPU, choice.config) is None}
    own = {"a16w4_gptq_g128-checkpoint", "a16w4_gptq_g128_head4-checkpoint"}
    assert {*own, "bf16-torch"} <= runs <= own | {row.id for row in FORMATS.values() if row.backend == "torch"}
    reason = backends.unmet(FORMATS["a16w4_g128-torchao"], CPU, choice.config)
    assert reason is not None
    assert reason.reason == (
        "this checkpoint is quantized already (gptq, 4 bits, group 128): a16w4_gptq_g128-checkpoint runs it as it is, "
        "bf16-torch dequantized; give the unquantized model for other formats"
    )
    with pytest.raises(LowbitError, match=r"a16w8-lowbit can't run here: .* quantized already"):
        Generator.from_model(tmp_path, "a16w8", device="cpu")


def test_a_row_of_a_checkpoint_is_not_run_on_a_plain_model(tmp_path):
    tiny_llama.save(tmp_path, **published.SHAPE)
    choice = choose(tmp_path)
    row = stored.as_row(stored.Stored("awq", 4, 128, symmetric=False))
    assert row.id not in FORMATS
    reason = backends.unmet(row, CPU, choice.config)
    assert "a16w4_awq_g128" in str(reason)
    assert "this one is not quantized" in str(reason)
    with pytest.raises(LowbitError, match=r"expects the checkpoint's own packed linears, but .*q_proj is a plain one"):
        quantized.build(models.load(choice), row, CPU)


def test_dummy_weights_are_not_made_of_it(tmp_path):
    publish(tmp_path, SCHEMES["gptq_g128"])
    with pytest.raises(LowbitError, match=r"quantized already .* leave the option out"):
        choose(tmp_path, "dummy")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gptq_g128", {"quant_method": "bitsandbytes"}, "by none of gptq, awq, compressed-tensors"),
        ("gptq_g128", {"bits": 5}, r"bits=5 \(expected one of 2, 3, 4, 8\)"),
        ("gptq_g128", {"bits": "4"}, "bits=0"),
        ("gptq_g128", {"group_size": 1024}, "group_size=1024"),
        ("gptq_g128", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq_g128", {"dynamic": {"-:.*": {}}}, "dynamic="),
        ("gptq_g128", {"pack_dtype": "int8", "bits": 6}, r"pack_dtype='int8'; bits=6"),
        ("awq_g64", {"version": "gemv"}, "version='gemv'"),
        ("awq_g64", {"bits": 8}, r"bits=8 \(expected one of 4\)"),
        ("awq_g64", {"zero_point": False}, "zero_point=False"),
        ("awq_g64", {"modules_to_not_convert": ["q_proj"]}, "modules_to_not_convert"),
        ("ct_g32", {"format": "float-quantized"}, r"type='int' \(expected 'float' in float-quantized\).*bits=4"),
        ("ct_g32", {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        ("ct_g32", {"config_groups": {"a": {}, "b": {}}}, "2 config_groups"),
        ("ct_g32", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("ct_g32", {"config_groups": {"a": {"weights": {"num_bits": 3, "group_size": 32}}}}, "bits=3"),
        (
            "ct_g32",
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "input_activations",
        ),
        (
            "ct_g32",
            {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32, "actorder": "size"}}}},
            "actorder='size'",
        ),
    ],
)
def test_an_option_that_is_not_read_names_itself(name, changes, expected):
    values = published.config(SCHEMES[name]) | changes
    with pytest.raises(LowbitError, match=expected) as caught:
        checkpoint.make_config({"model_type": "llama", "quantization_config": values}, "config.json")
    assert str(caught.value).startswith("config.json: ")


BIAS = "model.layers.0.mlp.down_proj.bias"


def test_a_bias_of_zeros_is_none(tmp_path):
    """optimum's GPTQ writes one for every linear."""
    publish(tmp_path, SCHEMES["gptq_g128"])
    tiny_llama.edit_weights(tmp_path, lambda tensors: tensors.update({BIAS: torch.zeros(128, dtype=torch.float16)}))
    assert models.load(choose(tmp_path)).master.model.layers[0].mlp.down_proj.bias is None


def swap(tensors):
    tensors["model.layers.1.mlp.down_proj.g_idx"] = tensors["model.layers.1.mlp.down_proj.g_idx"].flip(0)


def cut(tensors):
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = tensors[name][:-1].contiguous()


def spoil(tensors):
    tensors["model.layers.0.mlp.up_proj.scales"][0, 3] = torch.nan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.qzeros"), "v_proj.qzeros is missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda tensors: tensors.update({"model.more.qweight": torch.zeros(1)}), "1 unexpected: model.more.qweight"),
        (cut, r"up_proj.qweight expected \[16, 256\] in int32, got \[15, 256\]"),
        (swap, r"columns are in another order than their groups \(g_idx\), and its config denies it"),
        (spoil, "expected finite scales"),
        (lambda tensors: tensors.update({BIAS: torch.ones(128, dtype=torch.float16)}), "got one that is not zero"),
    ],
)
def test_a_wrong_checkpoint_says_what_is_wrong(tmp_path, change, expected):
    publish(tmp_path, SCHEMES["gptq_g128"])
    tiny_llama.edit_weights(tmp_path, change)
    with pytest.raises(LowbitError, match=expected):
        models.load(choose(tmp_path))


def test_a_truncated_file_is_named(tmp_path):
    publish(tmp_path, SCHEMES["awq_g64"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LowbitError, match="is truncated or no safetensors file"):
        models.load(choose(tmp_path))


@pytest.mark.parametrize("changes", [{"checkpoint_format": "gptq_v2"}, {"bits": 8}, {"group_size": 64}])
def test_a_config_of_another_version_is_found_out(tmp_path, changes):
    """The first one would shift every zero point by one: another model, but no crash."""
    publish(tmp_path, SCHEMES["gptq_g128"])
    published.edit_quantization(tmp_path, **changes)
    with pytest.raises(LowbitError, match=r"zero points of 8, got 7|expected \["):
        models.load(choose(tmp_path))


def test_columns_of_an_awq_word():
    """Word 0x76543210 holds columns 0 2 4 6 1 3 5 7 in its eight fields."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert stored_layouts._awq_columns(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_the_published_linears_are_all_of_them():
    row = stored.as_row(stored.Stored("gptq", 4, 128, True))
    assert row.targets == LINEARS
    assert not row.fast
