"""Kernel truth: right kernels pass with room, wrong ones do not, and what can't be known is said."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from live_bytes import LiveBytes
from torch import nn

from lowbit import backends, truth
from lowbit.backends import NoTruth
from lowbit.backends.torchao import unpacking
from lowbit.formats import FORMATS, LINEARS, Format
from lowbit.kernels import weights
from lowbit.kernels.modules import NativeEmbedding, NativeLinear
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stored_linear import StoredLinear
from lowbit.kernels.stream import pack_stream
from lowbit.kernels.stream_modules import StreamLinear, StreamPart
from lowbit.truth import BOUNDS, TruthError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16 = FORMATS["bf16-torch"]
INT8 = FORMATS["a8w8-torchao"]
KNOWN = [
    row
    for row in FORMATS.values()
    if "cpu" in row.devices
    and row.backend not in ("tables", "recipe")  # of a whole model: test_recipes.py
    and hasattr(backends.get(row.backend), "dequantize")
    and backends.unmet(row, tiny.CPU, tiny.config()) is None
]


def quantized(fmt, dtype=torch.bfloat16):
    made = tiny.model(dtype, num_hidden_layers=1)
    if fmt.calibration_windows:
        backends.get(fmt.backend).calibrate(made, fmt, torch.arange(64).view(2, 32))
    holder = nn.ModuleDict({"lm_head": made.lm_head})
    for module in (made.model.layers[0], holder):
        backends.get(fmt.backend).quantize(module, fmt, dtype)
    made.lm_head = holder["lm_head"]
    return made


@pytest.mark.parametrize(
    ("fmt", "name"),
    [(row, name) for row in KNOWN for name in (row.dtypes if row.backend == "torchao" else row.dtypes[:1])],
    ids=lambda value: getattr(value, "id", value),
)
def test_every_row_computes_the_product_with_its_own_weights(fmt, name):
    made = quantized(fmt, DTYPES[name])
    found = truth.prove(made, fmt, DTYPES[name], tiny.model(DTYPES[name], num_hidden_layers=1))
    assert {path.rsplit(".", 1)[-1] for path in found} == set(fmt.targets)
    assert all(math.isfinite(one.kernel) and one.kernel > 0 for one in found.values())  # 0: nothing was rounded
    if fmt.quantized:
        assert all(0 < one.weight < 1.5 for one in found.values())
    else:
        assert {one.weight for one in found.values()} == {0.0}


def test_one_linear_of_each_kind_is_asked():
    made = tiny.model()
    assert list(truth.prove(made, BF16, torch.bfloat16)) == [
        *(f"model.layers.0.self_attn.{name}" for name in LINEARS[:4]),
        *(f"model.layers.0.mlp.{name}" for name in LINEARS[4:]),
    ]
    head = Format("bf16", "torch", "cast", 16, 16, targets=("lm_head",))
    assert list(truth.prove(made, head, torch.bfloat16)) == ["lm_head"]


# -- wrong kernels ----------------------------------------------------------------------------------------------------


class Wrong(nn.Linear):
    """A linear whose product is spoilt."""

    def __init__(self, spoil):
        super().__init__(256, 64, bias=False, dtype=torch.bfloat16)
        self.spoil = spoil

    def forward(self, x):
        return self.spoil(self, x)


def nan_on_zeros(linear, x):
    out = nn.functional.linear(x, linear.weight)
    return out / (x.abs().amax(dim=-1, keepdim=True) > 0)


def one_group_dropped(linear, x):
    x = x.clone()
    x[..., 128:136] = 0
    return nn.functional.linear(x, linear.weight)


@pytest.mark.parametrize(
    ("spoil", "inputs"),
    [
        (nan_on_zeros, "a row of zeros"),
        (one_group_dropped, "row"),
        (lambda linear, x: nn.functional.linear(x, linear.weight) * 1.02, "row"),
        (lambda linear, x: nn.functional.linear(x.clamp(-50, 50), linear.weight), "outlier"),
        (lambda linear, x: nn.functional.linear(x, linear.weight) + 0.01 * (x.shape[-2] > 1), "4 rows"),
    ],
    ids=["nan", "group", "scale", "clamped", "many-rows"],
)
def test_a_wrong_kernel_is_named(spoil, inputs):
    made = tiny.model()
    made.model.layers[0].self_attn.k_proj = Wrong(spoil)
    with pytest.raises(TruthError, match=r"bf16-torch: .* at most 0\.00781 .* bfloat16, got [^,]*k_proj") as e:
        truth.prove(made, BF16, torch.bfloat16)
    found = truth.measure(made.model.layers[0].self_attn.k_proj, BF16, torch.bfloat16)
    assert found.kernel > BOUNDS[torch.bfloat16]
    assert inputs in found.inputs
    assert found.inputs in str(e.value)


def test_a_row_may_have_a_bound_of_its_own():
    made = tiny.model()
    made.model.layers[0].self_attn.k_proj = Wrong(lambda linear, x: nn.functional.linear(x, linear.weight) * 1.02)
    lenient = Format("bf16", "torch", "cast", 16, 16, options={"kernel_bound": 0.03})
    assert 0.01 < max(one.kernel for one in truth.prove(made, lenient, torch.bfloat16).values()) < 0.03


def test_small_rows_are_not_hidden_by_large_ones():
    ref = torch.tensor([[1000.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).double()
    out = torch.tensor([[1000.0, 0.0], [1.5, 0.0], [0.0, 0.2]])
    assert truth.errors(out, ref, typical=2.0).tolist() == pytest.approx([0.0, 0.5, 0.1])


def test_the_product_is_exact_whatever_the_matmul_precision(monkeypatch):
    monkeypatch.setattr(truth, "CHUNK", 64)  # several pieces
    weight, x = torch.randn(40, 32), torch.randn(3, 32)
    assert (truth.product(weight, x) - x.double() @ weight.double().T).abs().max() < 1e-12


# -- memory ----------------------------------------------------------------------------------------------------------


ROWS, COLUMNS = 8192, 256


def packed_head(name="int8"):
    plain = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16).requires_grad_(False)
    return plain, NativeLinear(quantize(plain.weight, name))


def streamed_head(name="int8"):
    """As on an H200, whose kernel that dequantizes is not here: it gives the same rows."""
    plain, packed = packed_head(name)
    linear = StreamLinear(StreamPart(pack_stream(packed.packed), ROWS))
    linear.dequantize = lambda dtype, start, stop: weights.dequantize(linear.rows(start, stop)).to(dtype)
    return plain, linear


def stored_head():
    plain, packed = packed_head()
    order = torch.arange(COLUMNS, dtype=torch.int32).flip(0)
    plain.weight.copy_(plain.weight.flip(1))
    return plain, StoredLinear(packed.packed, order=order)


def plain_head():
    plain = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    return plain, plain


def embedding():
    plain = nn.Embedding(ROWS, COLUMNS, dtype=torch.float16).requires_grad_(False)
    return plain, NativeEmbedding.from_embedding(plain, "int8")


def torchaos_head():
    plain = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    holder = nn.ModuleDict({"q_proj": copy.deepcopy(plain)})
    backends.get("torchao").quantize(holder, FORMATS["a16w8-torchao"], torch.bfloat16)
    return plain, holder["q_proj"]


HEADS = {
    "torchao's": (torchaos_head, "torchao", torch.bfloat16),
    "packed": (packed_head, "lowbit", torch.float16),
    "streamed": (streamed_head, "lowbit", torch.float16),
    "of a checkpoint": (stored_head, "checkpoint", torch.float16),
    "plain": (plain_head, "torch", torch.bfloat16),
    "embedding": (embedding, "tables", torch.float16),
}


@pytest.mark.parametrize("row", [row for row in KNOWN if row.targets == LINEARS], ids=lambda row: row.id)
def test_blocks_of_rows_are_the_whole_weight(row, monkeypatch):
    backend = backends.get(row.backend)
    made = quantized(row)
    for name in ("q_proj", "k_proj"):
        linear = getattr(made.model.layers[0].self_attn, name)
        blocks = list(truth._blocks(backend, linear))
        monkeypatch.setattr(truth, "CHUNK", 48 * 256)
        cut = list(truth._blocks(backend, linear))
        assert (len(blocks), len(cut)) == (1, -(-linear.out_features // 48))
        assert torch.equal(torch.cat(cut), blocks[0])
        assert torch.equal(blocks[0], backend.dequantize(linear).float())
        monkeypatch.undo()


@pytest.mark.parametrize("kind", HEADS)
def test_a_large_matrix_is_proven_in_pieces(kind, monkeypatch):
    """Whole it was there three times in fp32: 6 GB for Llama-3.1-8B's head, beside its 8 GB in int8 too much for 12."""
    make, backend, dtype = HEADS[kind]
    plain, module = make()
    fmt = Format("a16w8", backend, "int8", 16, 8)
    ask = truth.measure_rows if kind == "embedding" else truth.measure
    whole = ask(module, fmt, dtype, plain.weight)
    monkeypatch.setattr(truth, "CHUNK", 2**16)
    monkeypatch.setattr(weights, "PIECE", 2**16)
    with LiveBytes() as made:
        found = ask(module, fmt, dtype, plain.weight)
    products_own = 1 if kind == "torchao's" else 0  # its product takes the whole weight in 16 bits
    assert made.peak < (2 + products_own) * ROWS * COLUMNS  # bytes a weight; it was 12
    assert found.kernel == pytest.approx(whole.kernel, rel=1e-6)
    assert found.weight == pytest.approx(whole.weight, rel=1e-4)  # fp32 norm of 2 million numbers: 4e-5
    assert found.inputs == whole.inputs
    assert 0 < found.kernel < BOUNDS[dtype]


def test_a_wrong_row_of_any_piece_is_found(monkeypatch):
    """A kernel that reads the scale of the last piece wrong, and an embedding whose last row is not its table's."""
    monkeypatch.setattr(truth, "CHUNK", 2**16)
    _, module = packed_head()
    fmt = Format("a16w8", "lowbit", "int8", 16, 8)
    forward = module.forward
    module.forward = lambda x: torch.cat([forward(x)[..., :-64], 1.5 * forward(x)[..., -64:]], -1)
    assert truth.measure(module, fmt, torch.float16).kernel > 4 * BOUNDS[torch.float16]
    _, table = embedding()
    look_up = table.forward
    table.forward = lambda ids: look_up(ids) * torch.where(ids == ROWS - 1, 1.5, 1.0).half().unsqueeze(-1)
    assert truth.measure_rows(table, fmt, torch.float16).kernel > 4 * BOUNDS[torch.float16]


# -- what can't be known ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ({}, "other gives its weights back in no way"),
        ({"dequantize": lambda module: module.weight}, "other shows its quantized activations in no way"),
    ],
)
def test_a_library_that_cannot_tell(monkeypatch, offers, reason):
    monkeypatch.setattr(backends, "get", lambda name: SimpleNamespace(**offers))
    with pytest.raises(NoTruth, match=reason):
        truth.prove(tiny.model(), Format("a8w8", "other", "x", 8, 8), torch.bfloat16)


# -- torchao's packed int4 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 128, 208, 48])
def test_the_cpu_kernels_order_is_taken_apart(n):
    numbers = torch.randint(0, 16, (n, 96), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    assert torch.equal(unpacking._unpack_cpu(packed), numbers.long())


def test_tiles_of_any_order_are_taken_apart():
    """The CUDA operator needs a GPU: a random order of nibbles stands in for its."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    pack = lambda tile: tile.flatten()[order].view(32, 4, 8)  # noqa: E731
    numbers = torch.randint(0, 16, (24, 384), dtype=torch.int32)
    tiles = numbers.view(3, 8, 3, 128).transpose(1, 2)
    stored = torch.stack([torch.stack([pack(tile) for tile in row]) for row in tiles])  # [3, 3, 32, 4, 8]
    shifts = torch.arange(0, 32, 4)
    packed = (stored.long() << shifts).sum(-1).to(torch.int32)
    assert (packed < 0).any()  # a sign bit must not leak into the neighbours
    assert torch.equal(unpacking._unpack_tiles(packed, pack), numbers)


def test_activations_are_those_of_the_kernel():
    linear = quantized(INT8).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    seen = unpacking.quantize_activations(linear, x)
    step = x.float().abs().amax(dim=1, keepdim=True) / 127.5
    assert ((seen - x).abs() <= 0.51 * step).all()
    assert not torch.equal(seen, x.float())
