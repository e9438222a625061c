from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import model
from torch import nn

from lowbit import backends
from lowbit.backends import coverage
from lowbit.backends.coverage import CoverageError, storage_bytes, tensors_of
from lowbit.formats import FORMATS, LINEARS, Format
from lowbit.quiet import quiet_import

INT4 = FORMATS["a16w4_g128-torchao"]
INT8 = FORMATS["a16w8-torchao"]
NF4 = FORMATS["a16w4_nf4_dq-bitsandbytes"]

# Of the tiny model: per layer q, o 256x256; k, v 64x256; gate, up, down 768x256; embedding and head 512x256.
WEIGHTS = 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 768 * 256)
ROWS = 2 * (2 * 256 + 2 * 64 + 2 * 768 + 256)
TABLE_BYTES = 512 * 256 * 2


def quantize(made, fmt, layers=None):
    for layer in made.model.layers[:layers]:
        backends.get(fmt.backend).quantize(layer, fmt, torch.bfloat16)
    return made


def test_the_plain_model_is_counted_by_hand():
    found = coverage.inspect(model(), FORMATS["bf16-torch"])
    assert (found.linears, found.expected, found.bits_per_weight) == (14, 14, 16.0)
    assert found.weight_bytes == 2 * WEIGHTS
    norms = 5 * 256 * 2
    rotary = 16 * 4  # inv_freq; original_inv_freq is the same storage or a copy of it
    assert found.resident_bytes - (2 * WEIGHTS + 2 * TABLE_BYTES + norms) in (rotary // 2, rotary, 2 * rotary)
    assert found.resident_bytes - found.streamed_bytes == TABLE_BYTES


@pytest.mark.parametrize(
    ("fmt", "data", "scales"),
    [
        (INT8, WEIGHTS, None),
        (INT4, WEIGHTS // 2, WEIGHTS // 128 * 4),
        (FORMATS["a8w8_llmint8-bitsandbytes"], WEIGHTS, 4 * ROWS),
    ],
    ids=["int8", "int4", "llmint8"],
)
def test_quantized_bytes_are_data_and_scales(fmt, data, scales):
    found = coverage.inspect(quantize(model(), fmt), fmt)
    assert found.weight_bytes == data + scales if scales else data < found.weight_bytes < 1.05 * data
    assert found.bits_per_weight == pytest.approx(8 * found.weight_bytes / WEIGHTS)
    plain = coverage.inspect(model(), FORMATS["bf16-torch"])
    assert plain.resident_bytes - found.resident_bytes == plain.weight_bytes - found.weight_bytes
    assert plain.streamed_bytes - found.streamed_bytes == plain.weight_bytes - found.weight_bytes


def test_double_quantization_is_seen_through():
    # as it lies on a GPU; a CPU with AVX512-BF16 packs it again at the first call, with one bf16 scale per block
    bnb = quiet_import("bitsandbytes")
    weight = torch.randn(256, 768, dtype=torch.bfloat16)
    blocks = weight.numel() // 64
    sizes = {}
    for nested in (False, True):
        parameter = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=nested).to("cpu")
        sizes[nested] = storage_bytes(tensors_of(parameter))
    data, table = weight.numel() // 2, 16 * 4
    assert sizes[False] == data + 4 * blocks + table
    # scales in 8 bits, one fp32 per 256 of them, their mean, and a table of 256 fp32
    assert sizes[True] == data + blocks + 4 * (blocks // 256) + 4 + 256 * 4 + table


def test_nf4_takes_its_four_bits_and_little_more():
    assert 4.1 < coverage.inspect(quantize(model(), NF4), NF4).bits_per_weight < 4.6


def test_a_tied_table_counts_once_and_as_the_head():
    tied = coverage.inspect(model(tie_word_embeddings=True), FORMATS["bf16-torch"])
    untied = coverage.inspect(model(), FORMATS["bf16-torch"])
    assert untied.resident_bytes - tied.resident_bytes == TABLE_BYTES
    assert tied.streamed_bytes == untied.streamed_bytes == tied.resident_bytes


def test_a_layer_that_the_library_left_in_bf16_is_found():
    odd = model(intermediate_size=192)  # 192 is no multiple of 128: torchao says nothing and leaves down_proj as it is
    quantize(odd, INT4)
    with pytest.raises(
        CoverageError, match=r"expected 14 linears with its weights, got 12: .*layers\.0\.mlp\.down_proj"
    ):
        coverage.inspect(odd, INT4)


def test_a_forgotten_layer_is_found():
    for fmt in (INT8, NF4):
        with pytest.raises(CoverageError, match="expected 14 linears with its weights, got 7"):
            coverage.inspect(quantize(model(), fmt, layers=1), fmt)


def test_a_row_that_only_casts_wants_plain_linears():
    with pytest.raises(CoverageError, match="expected 14 linears with its weights, got 0"):
        coverage.inspect(quantize(model(), INT8), FORMATS["bf16-torch"])


def test_missing_linears_are_found():
    made = quantize(model(), INT8)
    for layer in made.model.layers:
        layer.mlp.merged, layer.mlp.gate_proj = layer.mlp.gate_proj, None
    with pytest.raises(CoverageError, match="expected 14 linears with its weights, got 12"):
        coverage.inspect(made, INT8)


def test_weights_kept_unpacked_are_no_fast_format():
    made = model()
    api = quiet_import("torchao.quantization")
    config = api.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=api.PerGroup(128))
    api.quantize_(made.model, config, filter_fn=lambda module, name: name.rsplit(".", 1)[-1] in LINEARS)
    row = Format("a16w4_g128", "torchao", "intx", 16, 4, group_size=128)
    with pytest.raises(CoverageError, match=r"at most 6\.00 bits stored per weight, got 8\.\d\d"):
        coverage.inspect(made, row)
    assert coverage.inspect(made, dataclasses.replace(row, fast=False)).bits_per_weight > 8


def test_bytes_that_are_not_seen_are_an_error():
    with pytest.raises(CoverageError, match=r"expected at least 12 bits stored per weight, got 8\."):
        coverage.inspect(quantize(model(), INT8), Format("a16w12", "torchao", "x", 16, 12))


def test_padding_of_small_models_is_allowed_for():
    padded = Format("a16w4", "torchao", "x", 16, 4, options={"pads_k_to": 1024})
    # K 256 and 768 are stored as 1024: int8 tensors stand in for the 4-bit kernel's 16.x bits per weight
    assert coverage.inspect(quantize(model(), INT8), padded).bits_per_weight < 9


def test_the_head_counts_once_when_a_row_names_it():
    row = dataclasses.replace(INT8, targets=(*LINEARS, "lm_head"))
    made = model()
    backends.get("torchao").quantize(made, row, torch.bfloat16)
    found = coverage.inspect(made, row)
    assert (found.linears, found.expected) == (15, 15)


def test_windows_of_one_storage_count_as_windows():
    file = torch.zeros(1000)
    first, second = file[:100], file[200:300]
    assert storage_bytes([first, second]) == 800
    assert storage_bytes([first, first, file[:100]]) == 400
    assert storage_bytes([file, first, second]) == 4000


def test_tensors_are_found_wherever_libraries_hang_them():
    linear = nn.Linear(4, 4, bias=False)
    linear.register_buffer("scale", torch.ones(4))
    linear.meta = {"zero": torch.ones(2), "nested": [torch.ones(3)]}
    linear.weight.owner = linear  # a way back, as bitsandbytes has one
    assert sorted(tensor.numel() for tensor in tensors_of(linear)) == [2, 3, 4, 16]


def test_a_record_takes_it_as_a_dict():
    found = coverage.inspect(model(), FORMATS["bf16-torch"]).to_dict()
    assert found["linears"] == 14
    assert found["bits_per_weight"] == 16.0
