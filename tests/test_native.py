"""lowbit's own backend: packed modules in any Llama, head and tied tables included, proven against plain PyTorch."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from live_bytes import LiveBytes
from tiny import CPU, config, gpu, model
from torch import nn

from lowbit import backends
from lowbit.backends import coverage, native
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, LINEARS, recipes
from lowbit.hostmodel import HostModel
from lowbit.kernels import WEIGHT_FORMATS, dispatch, modules, nvrtc, runner, stream, weights
from lowbit.kernels.modules import NativeEmbedding, NativeLinear
from lowbit.kernels.stream_modules import StreamLinear
from lowbit.quantized import build

ROWS = [row for row in FORMATS.values() if row.backend == "lowbit"]
INT4 = FORMATS["a16w4_g128-lowbit"]
INT8 = FORMATS["a16w8-lowbit"]
IDS = torch.arange(32).view(2, 16)
pytestmark = pytest.mark.usefixtures("with_nvrtc")


def test_without_nvrtc_mode_native_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "available", lambda: "pip install cuda-bindings")
    assert str(native.step_unmet(INT8, gpu(9, 0), config())) == "package: pip install cuda-bindings"
    assert "needs SM90" in str(native.step_unmet(INT8, gpu(8, 0), config()))  # first, for it can't be mended


def quantized(fmt, dtype=torch.bfloat16, choose=None, **changes):
    made = model(dtype, **changes)
    for layer in made.model.layers:
        native.quantize(layer, fmt, dtype, choose)
    holder = nn.ModuleDict({"lm_head": made.lm_head})
    native.quantize(holder, fmt, dtype, choose)
    made.lm_head = holder["lm_head"]
    return made


def plain(made):
    """The same model with plain fp32 linears of the dequantized weights."""
    other = copy.deepcopy(made).float()
    for path, module in modules.packed_modules(other).items():
        weight = native.dequantize(module)
        new = (
            nn.Embedding.from_pretrained(weight) if isinstance(module, NativeEmbedding) else nn.Linear(1, 1, bias=False)
        )
        new.weight = nn.Parameter(weight, requires_grad=False)
        other.set_submodule(path, new)
    return other


@torch.no_grad()
def logits(made):
    return made(IDS).logits.float()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_every_weight_format_has_a_row():
    assert [row.scheme for row in ROWS] == list(WEIGHT_FORMATS)
    for row in ROWS:
        assert row.group_size == WEIGHT_FORMATS[row.scheme].group_size
        assert row.targets == (*LINEARS, "lm_head")
    assert {row.name for row in ROWS if row.suite == "quick"} == {"a16w8", "a16w4_g128"}


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_a_row_takes_every_linear_and_the_head(fmt):
    made = quantized(fmt)
    found = coverage.inspect(made, fmt)
    assert (found.linears, found.expected) == (15, 15)
    stored = [module.packed for module in modules.packed_modules(made).values()]
    assert found.weight_bytes == sum(packed.nbytes for packed in stored)
    count = sum(packed.n * packed.k for packed in stored)
    want = sum(packed.row.stored_bits(packed.k) * packed.n * packed.k for packed in stored) / count
    assert found.bits_per_weight == pytest.approx(want, rel=2e-3)
    assert found.kernels == "PyTorch reference (15)"


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_logits_are_those_of_the_dequantized_weights(fmt):
    """Rounding of activations to bf16 is all that differs."""
    made = quantized(fmt)
    assert relative(logits(made), logits(plain(made))) < 1.2e-2
    exact = quantized(fmt, torch.float32)
    assert relative(logits(exact), logits(plain(exact))) < 1e-5


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_widths(head_dim):
    made = quantized(INT4, head_dim=head_dim, num_attention_heads=256 // head_dim * 2, num_key_value_heads=2)
    assert coverage.inspect(made, INT4).linears == 15
    assert relative(logits(made), logits(plain(made))) < 1.2e-2


def test_a_tied_head_is_packed_and_its_table_stays():
    made = quantized(INT4, tie_word_embeddings=True)
    assert type(made.model.embed_tokens) is nn.Embedding
    assert isinstance(made.lm_head, NativeLinear)
    found = coverage.inspect(made, INT4)
    assert found.resident_bytes - found.streamed_bytes == 512 * 256 * 2
    assert relative(logits(made), logits(plain(made))) < 1.2e-2


def test_a_packed_table_and_a_tied_head_are_the_same_memory():
    made = model(tie_word_embeddings=True)
    native.quantize_embedding(made, "int8")
    assert isinstance(made.model.embed_tokens, NativeEmbedding)
    assert made.lm_head.codes.data_ptr() == made.model.embed_tokens.codes.data_ptr()
    assert made.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert relative(logits(made), logits(plain(made))) < 1.2e-2
    for layer in made.model.layers:
        native.quantize(layer, INT8, torch.bfloat16)
    found = coverage.inspect(made, INT8)
    assert found.resident_bytes == found.streamed_bytes  # the table is read as the head


def test_a_packed_table_of_its_own_is_not_streamed():
    made = quantized(INT8)
    native.quantize_embedding(made, "int4_g128")
    assert isinstance(made.lm_head, NativeLinear)
    found = coverage.inspect(made, INT8)
    assert found.resident_bytes - found.streamed_bytes == 512 * 256 * 4.25 / 8
    with pytest.raises(LowbitError, match=r"expects a plain nn\.Embedding, got a NativeEmbedding"):
        native.quantize_embedding(made, "int8")


def test_a_recipe_chooses_linear_by_linear():
    def choose(path):
        if path == "self_attn.v_proj":
            return "int8"
        return None if path == "mlp.down_proj" else "int4_g128"

    made = model()
    layer = made.model.layers[0]
    native.quantize(layer, INT4, torch.bfloat16, choose)
    assert layer.self_attn.v_proj.format == "int8"
    assert layer.self_attn.q_proj.format == "int4_g128"
    assert type(layer.mlp.down_proj) is nn.Linear
    assert logits(made).isfinite().all()


def test_twice_and_the_wrong_dtype_are_refused():
    layer = model().model.layers[0]
    with pytest.raises(LowbitError, match=r"a16w8-lowbit expects self_attn\.q_proj in torch\.float16"):
        native.quantize(layer, INT8, torch.float16)
    native.quantize(layer, INT8, torch.bfloat16)
    with pytest.raises(LowbitError, match=r"expects plain linears, but q_proj is a NativeLinear.*fresh copy"):
        native.quantize(layer, INT8, torch.bfloat16)
    with pytest.raises(LowbitError, match="expected one of lowbit's packed modules, got a Linear"):
        native.dequantize(nn.Linear(2, 2))


def test_an_unknown_weight_format_lists_the_known_ones():
    with pytest.raises(LowbitError, match=r"unknown weight format 'int5'; known: .*int4_g128"):
        native.quantize(model().model.layers[0], INT4, torch.bfloat16, lambda path: "int5")


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_module_moves_but_never_converts_its_buffers(name):
    linear = NativeLinear.from_linear(nn.Linear(256, 16, bias=False), name)
    before = {key: (tensor.dtype, tensor.clone()) for key, tensor in linear.packed.tensors().items()}
    linear.half().to(torch.bfloat16).double()
    for key, tensor in linear.packed.tensors().items():
        assert tensor.dtype == before[key][0]
        assert torch.equal(tensor, before[key][1])
    assert linear.to("meta").codes.is_meta


def test_a_bias_is_kept_and_the_linear_left_alone():
    linear = nn.Linear(256, 16)
    copied = linear.weight.detach().clone()
    packed = NativeLinear.from_linear(linear, "int8")
    x = torch.randn(3, 256)
    assert torch.allclose(packed(x), nn.functional.linear(x, native.dequantize(packed), linear.bias), atol=1e-5)
    assert torch.equal(linear.weight, copied)
    assert "[16, 256] int8" in repr(packed)
    assert torch.equal(packed.dequantize(), weights.dequantize(packed.packed))


def test_a_state_dict_goes_back_in():
    first = NativeLinear.from_linear(nn.Linear(256, 16, bias=False), "int4_g128")
    second = NativeLinear.from_linear(nn.Linear(256, 16, bias=False), "int4_g128")
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 256)
    assert torch.equal(first(x), second(x))


def test_the_kernel_that_would_run_is_told():
    made = quantized(INT4)
    dispatch.register("linear", "fast", lambda problem: problem.n == 512, lambda x, packed, dtype: x)
    try:
        assert native.kernels(made, torch.bfloat16) == "PyTorch reference (14), fast (1)"
    finally:
        dispatch.unregister("linear", "fast")


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_what_runs_where(fmt):
    assert backends.unmet(fmt, CPU, config()) is None
    assert backends.unmet(fmt, gpu(9, 0), config()) is None
    odd = backends.unmet(fmt, CPU, config(hidden_size=248, intermediate_size=764, num_attention_heads=4, head_dim=62))
    if fmt.group_size:
        assert str(odd).startswith(f"shape: group {fmt.group_size} does not divide q_proj (K=248)")
    elif fmt.scheme == "binary":
        assert "down_proj of shape [248, 764] has K=764, which 8 does not divide" in str(odd)
    else:
        assert odd is None


@pytest.mark.parametrize("row", [row for row in ROWS if row.scheme != "bf16"], ids=lambda row: row.id)
def test_linears_in_one_stream_are_counted_each_with_its_own_rows_and_nothing_is_added(monkeypatch, row):
    plain = quantized(row, torch.float16)
    monkeypatch.setattr(native, "streams", lambda device: True)
    streamed = quantized(row, torch.float16)
    assert isinstance(streamed.model.layers[0].mlp.up_proj, StreamLinear)
    want, got = coverage.inspect(plain, row), coverage.inspect(streamed, row)
    assert got.linears == want.linears == 15
    rows = 4 * 15 * 768 if row.scheme == "nvfp4" else 0  # a tensor's scale, fp32 for each row: of at most 768 in 15
    assert want.weight_bytes <= got.weight_bytes <= want.weight_bytes + rows
    assert want.bits_per_weight <= got.bits_per_weight <= want.bits_per_weight + (32 / 256 if rows else 0)
    assert "NVRTC unpack" in got.kernels


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_head_is_quantized_beside_nothing_that_could_wait(monkeypatch, tied):
    """On a GPU an 8 GB model was quantized at 10 GB: by the plain head, the embedding, and the stream's pieces."""
    monkeypatch.setattr(native, "streams", lambda device: True)
    for module, name in ((weights, "CHUNK"), (stream, "CHUNK_WEIGHTS")):
        monkeypatch.setattr(module, name, 1 << 16)
    rows, columns = 8192, 256
    master = model(torch.float16, vocab_size=rows, num_hidden_layers=1, tie_word_embeddings=tied).requires_grad_(False)
    if tied:
        assert master.lm_head.weight is master.model.embed_tokens.weight
    host = HostModel("tiny", "auto", master.config, master, [], 0)
    with LiveBytes() as made:
        found = host.build(
            torch.device("cpu"), torch.float16, lambda m: native.quantize(m, INT8, torch.float16), tables=("lm_head",)
        )
    assert isinstance(found.lm_head, StreamLinear)
    assert (type(found.model.embed_tokens), found.model.embed_tokens.weight.dtype) == (nn.Embedding, torch.float16)
    resident = coverage.resident_bytes(found)
    assert resident == pytest.approx(made.live, rel=0.02)
    # the head's codes are there twice while they are reordered: untied, where its 16 bits were or the embedding will be
    size = rows * columns
    assert made.peak < resident + (size if tied else 0) + size // 2


# -- what mode native decodes ------------------------------------------------------------------------------------------

H200 = gpu(9, 0)
INT2 = "a16w2_g128-lowbit"


def mixed(parts, **fields):
    return recipes.make(recipes.Recipe("mine", parts, **fields), FORMATS)


NATIVE_MIX = {
    "layers.0.*": INT8.id,
    "*.self_attn.*": INT4.id,
    "*.down_proj": INT2,
    "layers.*": INT4.id,
    "lm_head": INT8.id,
}


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_every_row_of_ours_decodes_natively_on_an_h200(fmt):
    assert "native" in fmt.modes
    assert native.step_unmet(fmt, H200, config()) is None
    assert native.step_unmet(fmt, H200, config(), batch=8) is None
    assert str(native.step_unmet(fmt, gpu(8, 0), config())).startswith("capability: needs SM90")


def test_a_recipe_of_lowbits_rows_decodes_natively():
    fmt = mixed(NATIVE_MIX)
    assert fmt.modes == ("eager", "reduce-overhead", "regional", "native")
    assert native.step_unmet(fmt, H200, config()) is None
    assert native.step_unmet(INT4, H200, config()) is None
    assert native.step_unmet(mixed(NATIVE_MIX, kv="fp8"), H200, config()) is None
    others = {"lm_head": "a16w4_nvfp4-lowbit", "*.self_attn.*": "a16w4_mxfp4-lowbit", "layers.*": "a16w3_g128-lowbit"}
    assert native.step_unmet(mixed(others), H200, config()) is None
    for kv in ("int8", "fp8"):
        row = FORMATS[f"a16w4_g128_lowbit_kv_{kv}-recipe"]
        assert row.kv == kv
        assert "native" in row.modes
        assert native.step_unmet(row, H200, config()) is None
    assert str(native.step_unmet(fmt, gpu(8, 0), config())).startswith("capability: needs SM90")
    assert str(native.step_unmet(fmt, H200, config(), batch=9)).startswith("shape: the native step decodes 1 to 8")


@pytest.mark.parametrize(
    ("parts", "fields", "reason"),
    [
        ({"layers.*": INT4.id}, {}, "this recipe gives lm_head none of them"),
        ({"*.q_proj": "a16w8-torchao", "*": INT4.id}, {}, r"gives model.layers.0.self_attn.q_proj none of them"),
        ({"*.q_proj": INT8.id, "*": INT4.id}, {}, r"q_proj, k_proj, v_proj share .*self_attn gets int4_g128 and int8"),
        ({"*.up_proj": INT8.id, "*": INT4.id}, {}, r"gate_proj, up_proj share a stream, which has one format"),
        ({"*": INT4.id}, {"dtype": "bf16"}, "want activations in float16 for these rows, the recipe's are in bf16"),
        ({"lm_head": "bf16-lowbit", "*": INT4.id}, {}, "want activations in bfloat16 and float16"),
        ({"*": INT4.id}, {"kv": "int4"}, "reads a KV cache of 16 bits, int8, fp8; this one is int4"),
    ],
)  # fmt: skip
def test_what_mode_native_can_not_decode_of_a_recipe_is_said(parts, fields, reason):
    unmet = native.step_unmet(mixed(parts, **fields), H200, config())
    assert unmet.kind == "capability"
    assert re.search(reason, unmet.reason), unmet.reason


def test_other_libraries_rows_take_mode_native_from_a_recipe():
    assert mixed({"lm_head": INT8.id, "layers.*": "a16w8-torchao"}).modes == ("eager", "reduce-overhead", "regional")
    assert mixed({"*": "a16w8-torchao"}).modes == ()


@pytest.mark.parametrize("parts", [NATIVE_MIX, {"*.q_proj": INT8.id, "*": INT4.id}, {"*.q_proj": INT8.id}])
@torch.no_grad()
def test_a_recipe_is_streamed_where_the_decode_kernels_run(monkeypatch, parts):
    """As on SM90: linears that share an x, in one format, become one stream; the others stay packed linears."""
    fmt, made = mixed(parts, dtype="fp16"), model(torch.float16)
    host = HostModel("tiny", "auto", made.config, made, [], 0)
    here = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
    packed = build(host, fmt, here).model
    monkeypatch.setattr(native, "streams", lambda device: True)
    found = build(host, fmt, here)
    assert found.coverage.linears == found.coverage.expected
    able = native.step_unmet(fmt, H200, made.config) is None
    assert (runner.unstreamed(found.model) is None) == able
    attention = found.model.model.layers[1].self_attn
    assert isinstance(attention.q_proj, StreamLinear if able else NativeLinear)
    for path, module in modules.packed_modules(packed).items():
        assert torch.equal(native.dequantize(found.model.get_submodule(path)), native.dequantize(module)), path
