"""The Triton path: what it takes where, how it cuts, that every kernel compiles for every GPU, and, in a process of its
own (tests/interpreted_triton.py), what the kernels compute. Where Triton is not installed, the last two are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes

from lowbit.kernels import WEIGHT_FORMATS, dispatch, quantize, triton_linear, weights
from lowbit.kernels.dispatch import Problem
from lowbit.kernels.weights import Packed

PACKED = [name for name in WEIGHT_FORMATS if name != "bf16"]
TRITON = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install --no-deps triton==3.7.1 (200 MB)"
)
BEFORE_37 = (
    "Triton {}: before 3.7.0 its interpreter runs no loop up to a tensor on NumPy 2.4 or later: `__index__` in "
    "triton/runtime/interpreter.py is int() of an array of one dimension, which NumPy 1.25 deprecated and 2.4 refuses"
)
"""Its fault, not the kernels': with that line as in 3.7.0 (``int(self.handle.data.squeeze())``) all 33 tests of
interpreted_triton.py pass on Triton 3.6.0 and NumPy 2.4.6."""
LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096), (2048, 2048), (512, 2048))


def problem(name="int4_g128", rows=1, dtype=torch.bfloat16, capability=(8, 0), n=4096, k=4096):
    return Problem(name, n, k, rows, dtype, "cpu" if capability is None else "cuda", capability)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(triton_linear, "_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# -- which kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("name", PACKED)
def test_every_gpu_since_sm80_runs_kernels_of_ours(installed, name, capability):
    def chosen(rows, dtype=torch.bfloat16):
        return dispatch.chosen("linear", problem(name, rows, dtype, capability))

    most = {"int8": 2, "fp8_e4m3": 2, "int3_g128": 8}.get(name, 4)
    kernels = ["Triton GEMV"] * most + ["Triton small GEMM"] * (8 - most) + ["Triton unpack + cuBLAS"] * 2
    assert [chosen(rows) for rows in (*range(1, 9), 9, 512)] == kernels
    assert chosen(8, torch.float32) == "Triton GEMV"
    assert dispatch.chosen("dequantize", problem(name, 0, capability=capability)) == "Triton unpack"


def test_bf16_is_left_to_cublas(installed):
    assert dispatch.chosen("linear", problem("bf16", 1)) == "cuBLAS"
    assert dispatch.chosen("linear", problem("bf16", 1, torch.float16)) == dispatch.REFERENCE


@pytest.mark.parametrize(
    "asked",
    [
        problem(capability=(7, 5)),
        problem(capability=None),
        problem("ternary", k=4100),
        problem(rows=0),
    ],
    ids=["SM75", "CPU", "K not in words of 8 codes", "no vector"],
)
def test_what_the_kernels_cannot_do_is_the_references(installed, asked):
    assert dispatch.chosen("linear", asked) == dispatch.REFERENCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_is_unpacked_in_pieces_before_its_product(monkeypatch, dtype):
    """It took 2 bytes a weight beside the model, 1 GiB for Llama-3.1-8B's. The unpacking itself is the reference's."""
    packed = quantize(torch.randn(4096, 256), "int8")
    x = torch.randn(3, 12, 256, dtype=dtype)
    asked = []

    def unpack(_, part, dtype):
        asked.append(part.n)
        return weights.dequantize(part).to(dtype)

    monkeypatch.setattr(triton_linear, "unpack", unpack)
    whole = triton_linear.unpack_gemm(x.flatten(0, 1), packed, dtype)
    monkeypatch.setattr(weights, "PIECE", 100 * 256)
    with LiveBytes() as made:
        found = triton_linear.unpack_gemm(x.flatten(0, 1), packed, dtype)
    assert asked == [4096, *[96] * 42, 64]
    assert made.peak < packed.n * packed.k
    torch.testing.assert_close(found, whole, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_without_triton_the_reference_says_that_it_runs(monkeypatch):
    monkeypatch.setattr(triton_linear, "_installed", lambda: False)
    assert dispatch.chosen("linear", problem()) == dispatch.REFERENCE


def test_the_interpreter_runs_on_the_cpu_what_it_can(installed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.chosen("linear", problem(capability=None)) == "Triton GEMV"
    assert dispatch.chosen("linear", problem(rows=5, dtype=torch.float16, capability=None)) == "Triton small GEMM"
    assert dispatch.chosen("linear", problem(rows=5, capability=None)) == dispatch.REFERENCE


# -- how it is cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_tiles_hold_whole_groups_and_fill_a_gpu(name, dot):
    row = WEIGHT_FORMATS[name]
    for n, k in LLAMA:
        cut = triton_linear.tiles(row, n, k, dot)
        assert cut.columns & (cut.columns - 1) == 0
        assert cut.columns % (row.group_size or 8) == 0
        if dot and row.group_size:
            assert cut.columns == row.group_size
        assert 1 <= cut.splits <= -(-k // cut.columns)
        assert -(-n // cut.rows) * cut.splits >= 128
    small = triton_linear.tiles(row, 16, 256, dot)
    assert small.columns <= 256


def test_codes_go_in_as_words_of_eight():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    found = {name: triton_linear.arguments(quantize(weight, name))[0] for name in PACKED}
    words = {"int4_g128": torch.int32, "mxfp4": torch.int32, "int2_g128": torch.int16, "ternary": torch.int16}
    assert {name: found[name].dtype for name in words} == words
    for name in ("int4_g128", "ternary", "binary"):
        assert found[name].shape == (4, 32)
    assert found["int8"].shape == (4, 256)


# -- compiled without a GPU --------------------------------------------------------------------------------------------


def sources():
    """(format, kernel, SM, vectors): every kernel for the oldest, two formats for every other."""
    for name in (*PACKED, "int4_zp", "int8_zp"):  # the last two: one zero per row
        for sm in (80, 89, 90, 120) if name in ("int8", "int4_g128") else (80,):
            for kernel, vectors in (("gemv", 1), ("gemv", 4), ("gemm", triton_linear.DOT_COLUMNS)):
                yield name, kernel, sm, vectors


def compiled(name: str, kernel: str, sm: int, vectors: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowbit.kernels import triton_gemv, triton_source

    row, dot = weights.find(name), kernel == "gemm"
    cut = triton_linear.tiles(row, 4096, 4096, dot)
    function = triton_source.gemm if dot else triton_gemv.gemv
    pointers = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16"}
    one = torch.ones(16, 1)
    stored = Packed(name, 16, 256, torch.zeros(16, row.row_bytes(256), dtype=torch.uint8), one, one)
    parts = triton_linear.arguments(quantize(torch.ones(16, 256), name) if name in PACKED else stored)
    types = {"x": "*bf16", "out": "*fp32", **dict.fromkeys(("m", "n", "k", "groups", "per_split", "magic"), "i32")}
    fixed = triton_linear.constants(row) | {"BN": cut.rows, "BK": cut.columns, "MP": vectors}
    fixed |= {"EACH": triton_linear.EACH, "WHOLE": vectors == 1}  # of more, a K that the tile does not divide
    for part, tensor in zip(("codes", "scale", "zero", "tensor_scale"), parts, strict=True):
        if tensor is None:
            fixed[part] = None
        else:
            types[part] = pointers.get(tensor.dtype, "*u8")
    names = function.arg_names
    fixed = {(names.index(key),): value for key, value in fixed.items() if key in names}
    aligned = {(names.index(key),): [["tt.divisibility", 16]] for key in types if key in names and key[0] != "p"}
    signature = {key: types.get(key, "constexpr") for key in names}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 4 if dot else 3}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


@TRITON
@pytest.mark.parametrize(("name", "kernel", "sm", "vectors"), list(sources()))
def test_every_kernel_compiles_for_every_gpu_and_keeps_to_its_registers(
    name, kernel, sm, vectors, tmp_path, monkeypatch
):
    """A compilation takes about a second: 66 of them."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(name, kernel, sm, vectors)
    assert ("mma" in found.asm["ptx"]) == (kernel == "gemm")
    (tmp_path / "kernel.cubin").write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    assert "REG:" in told.stdout
    assert " STACK:0 " in told.stdout  # registers that were spilled
    assert found.metadata.shared <= 48 * 1024


@TRITON
def test_what_the_kernels_compute_in_the_interpreter():
    """In a process of its own, because Triton decides at its import whether it interprets; a minute, for 22 formats."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(BEFORE_37.format(triton.__version__))
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(folder / "interpreted_triton.py"),
    ]
    where = os.pathsep.join(filter(None, (str(folder.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": where}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
