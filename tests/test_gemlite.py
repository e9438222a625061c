"""gemlite's rows. It can't be imported without a GPU: its helper is a stand-in; hqq and the arithmetic are real."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, config, gpu, model
from torch import nn

from lowbit import backends, truth
from lowbit.backends import NoTruth, hqq
from lowbit.backends import gemlite as backend
from lowbit.backends.gemlite import _values as values
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format

ROWS = [row for row in FORMATS.values() if row.backend == "gemlite"]
PROCESSORS = {
    *("A16W8_INT8", "A16W8_FP8", "A16W8_HQQ_INT", "A16W4_HQQ_INT", "A16W2_HQQ_INT", "A16W1_HQQ_INT"),
    *("A16W8_MXFP", "A16W4_MXFP", "A16W4_NVFP", "A8W8_INT8_dynamic", "A8W8_FP8_dynamic"),
    *("A8W4_HQQ_INT_dynamic", "A8W2_HQQ_INT_dynamic", "A8W8_MXFP_dynamic", "A8W4_MXFP_dynamic"),
    *("A4W4_MXFP_dynamic", "A4W4_NVFP_dynamic", "A16W158_INT", "A8W158_INT_dynamic"),
}
"""Every processor of gemlite.helper 0.6.0.post2 but for base classes and other spellings."""


# -- packing: a stand-in for the helper --------------------------------------------------------------------------------


class GemLiteLinearTriton(nn.Module):
    def __init__(self, source, processor):
        super().__init__()
        self.W_q, self.source, self.processor = torch.ones(4, dtype=torch.int32), source, processor


@torch.compile(backend="eager")
def is_compiled():
    return torch.compiler.is_compiling()


class Processor:
    """As gemlite's: even the MXFP processors inherit a from_hqqlinear (helper.py, A16Wn)."""

    def __init__(self, device, dtype, **arguments):
        self.device, self.dtype, self.arguments, self.way = device, dtype, arguments, None

    def from_linear(self, linear, del_orig):
        assert del_orig
        self.way, self.compiled = "linear", is_compiled()
        return GemLiteLinearTriton(linear, self)

    def from_hqqlinear(self, layer):
        self.way = "hqq"
        return GemLiteLinearTriton(layer, self)

    def from_weights(self, codes, scale):
        self.way = "ternary"
        return GemLiteLinearTriton((codes, scale), self)


@pytest.fixture
def gemlite_helper(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemlite.helper", SimpleNamespace(**dict.fromkeys(PROCESSORS, Processor)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_each_row_is_packed_where_it_is_by_its_own_way(gemlite_helper, row):
    if "HQQ" in row.scheme:
        pytest.importorskip("hqq")
    layer = model(torch.float16).model.layers[0]
    backend.quantize(layer, row, torch.float16)
    packed = layer.mlp.down_proj
    assert backend.is_quantized(packed)
    assert not packed.training
    processor = packed.processor
    assert (processor.device, processor.dtype) == ("cpu", torch.float16)
    assert processor.arguments == ({"block_quant": True} if "block" in row.name else {})
    assert processor.way == ("hqq" if "HQQ" in row.scheme else "ternary" if "158" in row.scheme else "linear")
    if processor.way == "linear":
        assert isinstance(packed.source, nn.Linear)
        assert not processor.compiled
    assert is_compiled()


@pytest.mark.parametrize("name", ["a16w4_g128", "a16w4_hqq", "a16w2_g32", "a16w1_g64", "a8w4_g64"])
def test_integers_come_from_hqq(gemlite_helper, name):
    pytest.importorskip("hqq")
    row = FORMATS[f"{name}-gemlite"]
    layer = model(torch.float16).model.layers[0]
    weight = layer.mlp.down_proj.weight.float()
    backend.quantize(layer, row, torch.float16)
    source = layer.mlp.down_proj.source
    group = row.group_size or weight.shape[1]
    assert (source.meta["nbits"], source.meta["group_size"], source.meta["axis"]) == (row.weight_bits, group, 1)
    assert source.meta["scale"].numel() == weight.numel() / group
    if row.weight_bits == 4:
        assert ((source.dequantize().float() - weight).norm() / weight.norm()).item() < 0.15


def test_the_bitnet_pair_gets_absmean_ternary_weights(gemlite_helper):
    layer = model(torch.float16).model.layers[0]
    weight = layer.mlp.up_proj.weight.float()
    backend.quantize(layer, FORMATS["a16w1.58-gemlite"], torch.float16)
    codes, scale = layer.mlp.up_proj.source
    assert codes.dtype == torch.float16
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert scale.item() == pytest.approx(weight.abs().mean().item())
    # the rule: rounded to the nearest of the three levels, so zero is what lies within half a mean of it
    assert torch.equal(codes == 0, weight.abs() <= scale / 2)
    assert torch.equal(codes, backend.ternarize(weight)[0].half())
    assert not backend.ternarize(torch.zeros(2, 4))[0].any()


def test_an_unknown_processor_lists_the_known_ones(gemlite_helper):
    with pytest.raises(LowbitError, match="unknown gemlite processor 'A16W5'; known: A16W158_INT, A16W1_HQQ_INT"):
        backend.quantize(model(), Format("a16w5", "gemlite", "A16W5", 16, 5), torch.bfloat16)


@pytest.mark.parametrize(("capability", "calls"), [((8, 9), [False]), ((9, 0), [False]), ((10, 0), [])])
def test_before_blackwell_fp4_is_packed_without_blackwells_instruction(monkeypatch, capability, calls):
    said = []
    monkeypatch.setitem(sys.modules, "gemlite.core", SimpleNamespace(set_ptx_fp4_pack=said.append))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend._leave_blackwells_instructions_alone(torch.device("cuda", 0))
    assert said == calls


def by_graphs(call, rep):
    call()
    return rep


@pytest.fixture
def switched(monkeypatch):
    """What gemlite's switch was asked for: (candidates, use_cuda_graph, the timer then), with a warning as Triton's."""
    asked = []
    testing = SimpleNamespace(do_bench_cudagraph=by_graphs)

    def set_autotune(config, use_cuda_graph):
        warnings.warn("use_cuda_graph parameters are deprecated", DeprecationWarning, stacklevel=1)
        asked.append((config, use_cuda_graph, testing.do_bench_cudagraph))

    monkeypatch.setitem(sys.modules, "gemlite.triton_kernels.config", SimpleNamespace(set_autotune=set_autotune))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    backend._tune_by_graphs.cache_clear()
    yield asked
    backend._tune_by_graphs.cache_clear()
    assert testing.do_bench_cudagraph is by_graphs


def test_on_a_gpu_kernels_tune_themselves_on_cuda_graphs_once_per_process_and_without_a_warning(switched, recwarn):
    backend.tune_by_graphs(torch.device("cpu"))
    assert switched == []
    for _ in range(2):
        backend.tune_by_graphs(torch.device("cuda", 0))
    assert [asked[:2] for asked in switched] == [({}, True)]
    assert not recwarn.list


def test_a_candidate_is_timed_when_the_gpu_has_done_what_was_asked_before(switched, monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("waited"))
    backend.tune_by_graphs(torch.device("cuda", 0))
    assert switched[0][2](lambda: did.append("timed"), rep=100) == 100
    assert did == ["waited", "timed"]


def test_tritons_tuner_keeps_the_timer_that_it_found_when_a_kernel_was_wrapped(monkeypatch):
    triton = pytest.importorskip("triton")
    testing, did = pytest.importorskip("triton.testing"), []
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda call, **options: did.append("timed"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("waited"))
    with backend._timed_in_order(testing), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        wrap = triton.autotune([triton.Config({})], key=[], use_cuda_graph=True)
        tuner = wrap(SimpleNamespace(arg_names=[], fn=lambda: None))
    tuner.do_bench(lambda: None, quantiles=(0.5, 0.2, 0.8))
    assert did == ["waited", "timed"]


@pytest.mark.parametrize("name", ["a16w8-gemlite", "a16w4_gemlite_g64-hqq"])
def test_gemlites_kernels_are_asked_to_by_every_row_that_runs_on_them(monkeypatch, gemlite_helper, name):
    asked = []
    monkeypatch.setattr(backend, "tune_by_graphs", asked.append)
    row = FORMATS[name]
    monkeypatch.setattr(hqq, "_convert", lambda target, *_: GemLiteLinearTriton(target.linear, None))
    backends.get(row.backend).quantize(model(torch.float16).model.layers[0], row, torch.float16)
    assert set(asked) == {torch.device("cpu")}


# -- what packed modules stand for -------------------------------------------------------------------------------------

K, N, GROUP = 256, 8, 64


def packed(codes, bits, per_word, dtype=torch.int32):
    """[k, n] codes -> [k / per_word, n] words, the first code in the lowest bits."""
    words = torch.zeros(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int64)
    for position in range(per_word):
        words |= codes[position::per_word].long() << (bits * position)
    return words.to(dtype)


def module(**fields):
    """A stand-in with the fields of GemLiteLinearTriton that its values hang on."""
    common = {"input_dtype": SimpleNamespace(name="FP16"), "channel_scale_mode": 0, "scaled_activations": False}
    plain = {"zeros": torch.tensor([[]]), "meta_scale": torch.tensor(0.0), "elements_per_sample": 1}
    made = SimpleNamespace(**common | plain | fields)
    for name in ("W_q", "scales", "zeros", "meta_scale"):
        setattr(made, name, nn.Parameter(getattr(made, name), requires_grad=False))
    return made


def numbers(*shape, low=0.5, high=1.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * (high - low) + low


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", [3, 4])
def test_grouped_integers(bits, mode):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (K, N), generator=generator)
    scales, zeros = numbers(K // GROUP, N).half(), numbers(K // GROUP, N, high=7).half()
    stored = zeros if mode == 3 else (-zeros.float() * scales.float()).half()
    per_word = 32 // bits
    made = module(
        W_q=packed(codes, bits, per_word), W_nbits=bits, elements_per_sample=per_word, W_group_mode=mode,
        scales=scales, zeros=stored,
    )  # fmt: skip
    wide = [tensor.float().repeat_interleave(GROUP, 0) for tensor in (scales, zeros)]
    want = ((codes.float() - wide[1]) * wide[0]).T
    # rounded to fp16 as the kernel rounds: zero point times scale, and the weight
    assert (values.weight_of(made) - want).abs().max().item() <= 2.0**-10 * (want.abs().max().item() + 12)


def test_rows_of_bytes_and_of_fp8():
    for dtype in (torch.int8, torch.float8_e4m3fn):
        stored = (numbers(N, K, low=-100, high=100)).to(dtype)
        scales = numbers(1, N)
        for mode, channel in ((2, 0), (0, 3)):
            made = module(W_q=stored.t(), W_nbits=8, W_group_mode=mode, channel_scale_mode=channel, scales=scales)
            assert torch.allclose(values.weight_of(made), stored.float() * scales.T)


def test_blocks_of_128_and_their_edges():
    stored = numbers(200, 300, low=-100, high=100).to(torch.int8)
    scales = numbers(3, 2)  # [k / 128, n / 128], both rounded up
    made = module(W_q=stored.t(), W_nbits=8, W_group_mode=0, channel_scale_mode=5, scales=scales)
    got = values.weight_of(made)
    assert got.shape == stored.shape
    for row, column in ((0, 0), (127, 128), (199, 299), (128, 127)):
        assert got[row, column] == stored[row, column].float() * scales[column // 128, row // 128]


def test_ternary_codes():
    codes = torch.randint(0, 3, (K, N), generator=torch.Generator().manual_seed(1))
    made = module(
        W_q=packed(codes, 2, 16), W_nbits=2, elements_per_sample=16, W_group_mode=1, channel_scale_mode=3,
        scales=torch.full((1, N), 0.25), zeros=torch.tensor(1, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(values.weight_of(made), (codes.float() - 1).T * 0.25)


@pytest.mark.parametrize("bits", [4, 8])
def test_mx_values_have_a_power_of_two_per_32(bits):
    exponents = torch.randint(120, 132, (N, K // 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    if bits == 4:
        codes = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(1))
        stored, plain, per_word = packed(codes, 4, 2, torch.uint8), torch.tensor(values.FP4)[codes].T, 2
    else:
        plain = numbers(N, K, low=-400, high=400).to(torch.float8_e4m3fn)
        stored, per_word = plain.t(), 1
    kind = SimpleNamespace(name="MXFP16")
    made = module(W_q=stored, W_nbits=bits, elements_per_sample=per_word, input_dtype=kind, scales=exponents)
    want = plain.float() * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    assert torch.equal(values.weight_of(made), want)
    made.scales = nn.Parameter(torch.zeros(1, 1, 2, 2, 256, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NoTruth, match="shuffled for TMA"):
        values.weight_of(made)


@pytest.mark.parametrize("dynamic", [False, True])
def test_nvfp4_has_an_e4m3_scale_per_16_and_one_factor(dynamic):
    codes = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(1))
    scales = numbers(N, K // 16, low=1, high=400).to(torch.float8_e4m3fn)
    factor = torch.tensor(2048.0)
    made = module(
        W_q=packed(codes, 4, 2, torch.uint8), W_nbits=4, elements_per_sample=2, scales=scales,
        input_dtype=SimpleNamespace(name="NVFP4"), scaled_activations=dynamic,
        meta_scale=factor if dynamic else 1 / factor,
    )  # fmt: skip
    want = torch.tensor(values.FP4)[codes].T * scales.float().repeat_interleave(16, 1) / 2048
    assert torch.allclose(values.weight_of(made), want)


@pytest.mark.parametrize(
    ("kind", "mode", "name", "width"),
    [
        ("INT8", 3, "scale_activations_per_token", K),
        ("FP8", 5, "scale_activations_per_block", 128),
        ("MXFP8", 2, "scale_activations_per_token", K),
        ("MXFP8", 4, "scale_activations_mxfp8", 32),
        ("MXFP4", 4, "scale_activations_mxfp4", 32),
        ("NVFP4", 4, "scale_activations_nvfp4", 16),
    ],
)
def test_activations_by_gemlites_own_quantizers(monkeypatch, kind, mode, name, width):
    codes = torch.randint(0, 16, (3, K), generator=torch.Generator().manual_seed(1))
    e8m0 = name.endswith(("mxfp8", "mxfp4"))
    rows = 16 if kind == "NVFP4" else 3  # its scales are padded to 16 rows
    scales = torch.full((rows, K // width), 126).to(torch.uint8) if e8m0 else torch.full((rows, K // width), 0.5)
    halves = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    four = kind in ("MXFP4", "NVFP4")

    def quantizer(x, w_dtype=None):
        assert (w_dtype is None) == four
        found = (halves if four else codes.to(torch.int8), scales)
        return (*found, torch.tensor([4.0])) if kind == "NVFP4" else found

    monkeypatch.setitem(sys.modules, "gemlite.quant_utils", SimpleNamespace(**{name: quantizer}))
    made = module(
        W_q=torch.ones(1), scales=torch.ones(1), input_dtype=SimpleNamespace(name=kind), channel_scale_mode=mode,
        scaled_activations=True, compute_dtype=torch.int8,
    )  # fmt: skip
    want = (torch.tensor(values.FP4)[codes] if four else codes.float()) * (0.125 if kind == "NVFP4" else 0.5)
    assert torch.equal(backend.quantize_activations(made, torch.zeros(3, K)), want)


def test_weight_only_activations_are_what_they_were():
    x = torch.randn(2, K).half()
    made = module(W_q=torch.ones(1), scales=torch.ones(1))
    assert torch.equal(backend.quantize_activations(made, x), x.float())


# -- what can't run, and why -------------------------------------------------------------------------------------------


@pytest.fixture
def triton_is(monkeypatch):
    installed = metadata.version

    def be(version, gemlite="0.6.0.post2"):
        told = {"triton": version, "gemlite": gemlite}
        monkeypatch.setattr(metadata, "version", lambda name: told.get(name) or installed(name))

    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    return be


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("a16w8_fp8", gpu(8, 6), "capability: needs SM89 (fp8), this is SM86"),
        ("a8w8_fp8_block128", gpu(8, 0), "capability: needs SM89 (fp8), this is SM80"),
        ("a8w4_g64", gpu(8, 0), "capability: needs SM89 (fp8 activations), this is SM80"),
        ("a16w8_mxfp8", gpu(8, 6), "capability: needs SM89 (fp8), this is SM86"),
        ("a8w4_mxfp4", gpu(8, 6), "capability: needs SM89 (fp8), this is SM86"),
        ("a16w4_mxfp4", gpu(7, 5), "capability: needs SM80 (bf16 products of fp4), this is SM75"),
        ("a16w4_nvfp4", gpu(8, 0), "capability: needs SM89 (fp8 scales), this is SM80"),
        ("a16w1.58", gpu(7, 0), "capability: needs SM75 (Triton), this is SM70"),
        ("a16w1.58", CPU, "capability: needs cuda, this is cpu"),
    ],
)
def test_capability_names_what_is_needed_and_what_is_there(triton_is, name, device, reason):
    triton_is("3.9.0")
    assert str(backends.unmet(FORMATS[f"{name}-gemlite"], device, config())) == reason


@pytest.mark.parametrize("name", ["a16w4_nvfp4", "a4w4_nvfp4"])
def test_nvfp4_below_blackwell_needs_a_triton_that_emulates_it(triton_is, name):
    row = FORMATS[f"{name}-gemlite"]
    triton_is("3.7.0")
    reason = "package: needs SM100 or Triton 3.8 (NVFP4), this is SM90 with Triton 3.7"
    assert str(backends.unmet(row, gpu(9, 0), config())) == reason
    assert backends.unmet(row, gpu(10, 0), config()) is None
    triton_is("3.10.1")
    assert backends.unmet(row, gpu(9, 0), config()) is None


@pytest.mark.parametrize("row", [row for row in ROWS if "HQQ" in row.scheme], ids=lambda row: row.id)
def test_what_decodes_has_two_words_of_codes_in_a_group(triton_is, row):
    """gemlite 0.6.0.post2's own pruner, asked for up to 4 rows, leaves nothing for 1 bit in groups of 32, and ten or
    more configurations for 1 bit from 64 on, 2 and 4 bits from 32 on; 8 bits are another kernel's."""
    triton_is("3.6.0")
    reason = backends.unmet(row, gpu(9, 0), config(hidden_size=256, intermediate_size=256))
    assert (reason is None) == (row.id != "a16w1_g32-gemlite")


def test_one_bit_in_small_groups_says_what_gemlite_takes(triton_is):
    row = FORMATS["a16w1_g32-gemlite"]
    triton_is("3.6.0")
    assert str(backends.unmet(row, gpu(9, 0), config())) == (
        "shape: needs groups of 64, this row's have 32: up to 4 rows, gemlite up to 0.6.0.post2 multiplies half "
        "a group at a time, and unpacks 32 weights of 1 bit at once"
    )
    triton_is("3.6.0", gemlite="0.6.1")  # unread: it may
    assert backends.unmet(row, gpu(9, 0), config()) is None


def test_without_triton_the_package_is_the_reason(monkeypatch):
    installed = metadata.version

    def missing(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "triton" else object())
    reason = backends.unmet(FORMATS["a16w4_nvfp4-gemlite"], gpu(9, 0), config())
    assert str(reason) == 'package: triton is not installed; pip install "lowbit[gpu]"'


def test_everything_but_nvfp4_and_one_bit_in_groups_of_32_runs_on_an_h200_in_the_8b_shape(triton_is):
    triton_is("3.6.0")
    llama = SimpleNamespace(**config(hidden_size=4096, intermediate_size=14336).to_dict())
    unmet = {row.name for row in ROWS if backends.unmet(row, gpu(9, 0), llama)}
    assert unmet == {"a16w4_nvfp4", "a4w4_nvfp4", "a16w1_g32"}


def test_every_processor_has_a_row():
    assert {row.scheme for row in ROWS} == PROCESSORS
    assert {row.group_size for row in ROWS if row.scheme == "A16W4_HQQ_INT"} == {None, 32, 64, 128, 256}
    assert sum("block" in row.name for row in ROWS) == 2
    assert [row.name for row in ROWS if row.suite == "quick"] == ["a16w8", "a16w4_g128", "a8w8_fp8"]
    assert all("speed demonstration" in row.note for row in ROWS if row.weight_bits == 1.58)


# -- integers below 8 bits are added up in fp16 (lowbit.formats.gemlite.in_parts) --------------------------------------


def added_in_fp16(parts):
    """Parts [count, n], cast to fp16 and added in an order by chance, each addition rounded, as atomics do -> [n]."""
    out = torch.zeros(parts.shape[1], dtype=torch.float16)
    for part in parts[torch.randperm(len(parts))].half():
        out = out + part
    return out


@pytest.mark.parametrize("what", ["a row of noise", "a row with an outlier"])
def test_sums_in_parts_stay_within_their_rows_bound_and_a_wrong_group_does_not(what):
    k, n = 14336, 256  # the largest of Llama-3.1-8B, 16 columns a part: the most parts
    torch.manual_seed(0)
    weight = (torch.randn(n, k) * 0.02).half()
    x = truth.inputs(k, torch.float16, torch.device("cpu"))[what]
    ref = truth.product(weight, x)
    parts = (x.float() * weight.float()).view(n, -1, 16).sum(2).T
    found = [truth.errors(added_in_fp16(parts)[None], ref, 1.0).item() for _ in range(20)]
    bound = FORMATS["a16w4_g128-gemlite"].options["kernel_bound"]
    assert truth.BOUNDS[torch.float16] < min(found)
    assert max(found) < bound
    assert truth.errors(parts.half().sum(0, dtype=torch.float32)[None], ref, 1.0).item() < truth.BOUNDS[torch.float16]
    wrong = parts.clone()
    wrong[:8] *= 0.5  # a group of 128 by another's scale
    assert truth.errors(added_in_fp16(wrong)[None], ref, 1.0).item() > 2 * bound


def test_rows_that_add_parts_in_fp16_have_that_bound_and_say_so():
    """gemlite's get_matmul_type: below 8 bits, but not the microscaled formats; hqq's row on the same kernel."""
    packed = {
        row.id
        for row in FORMATS.values()
        if row.backend == "gemlite" and row.weight_bits < 8 and not {"mxfp4", "nvfp4"} & set(row.keywords)
    } | {"a16w4_gemlite_g64-hqq"}
    bound = {id for id, row in FORMATS.items() if row.options.get("kernel_bound") == 2.0**-7}
    assert bound == packed
    assert len(packed) == 18
    assert all("in fp16" in FORMATS[id].note for id in packed)
