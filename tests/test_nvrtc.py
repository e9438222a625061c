"""The CUDA kernels, compiled for their GPU on a machine without one: they build, spill nothing, are kept on disk."""

from __future__ import annotations

import ctypes
import re

import pytest

from lowbit.errors import LowbitError
from lowbit.kernels import arguments, batch, nvrtc, prefill, runner
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.stream import LAYOUTS, stage_columns

needs_nvrtc = pytest.mark.skipif(nvrtc.available() is not None, reason=f"NVRTC is not installed: {nvrtc.available()}")
pytestmark = needs_nvrtc

LLAMA_8B = {"hidden": 4096, "inter": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "eps": 1e-5}
LLAMA_1B = {"hidden": 2048, "inter": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64, "eps": 1e-5}
LLAMA_3B = {"hidden": 3072, "inter": 8192, "heads": 24, "kv_heads": 8, "head_dim": 128, "eps": 1e-5}
SMALL = {"hidden": 256, "inter": 768, "heads": 8, "kv_heads": 2, "head_dim": 32, "eps": 1e-6}
CASES = [
    *((name, LLAMA_8B) for name in LAYOUTS),
    ("int4_g128", LLAMA_1B),
    ("int4_g128", LLAMA_3B),
    ("bf16", SMALL),
]
SOURCE = nvrtc.read_sources("ptx", "common", "decode", "product", "attention", "embedding", "unpack", "prefill")
BATCH_SOURCE = nvrtc.read_sources("batch_x", "batch")
STRUCTURES = {
    "Product": arguments.Product,
    "Embed": arguments.Embed,
    "Attention": arguments.Attention,
    "Unpack": arguments.Unpack,
    "Norm": arguments.Norm,
    "Rope": arguments.Rope,
    "Silu": arguments.Silu,
}


SEVERAL = {"Batch": arguments.Batch, "Normalize": arguments.Normalize}
"""For 2 to 8 sequences; compiled for those alone."""


def layout_checks(structures=STRUCTURES):
    """C++ that compiles only if an argument is as large as ctypes makes it."""
    return "\n".join(
        f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}");' for name, kind in structures.items()
    )


@pytest.mark.parametrize("name", [*STRUCTURES, *SEVERAL])
def test_arguments_have_the_kernels_fields_in_their_order(name):
    body = re.search(rf"struct {name} {{(.*?)\n?}};", SOURCE + BATCH_SOURCE, re.DOTALL)[1]
    body = re.sub(r"//.*", "", body)
    fields = [
        re.sub(r"\W", "", word)
        for line in body.split(";")
        if line.strip()
        for word in re.sub(r"^(const )?\w+", "", line.strip()).split(",")
    ]
    assert fields == [field for field, _ in (STRUCTURES | SEVERAL)[name]._fields_]


@pytest.mark.parametrize(
    ("name", "shape", "kv"),
    [*((*case, "") for case in CASES), *(("int4_g128", shape, "int8") for shape in (LLAMA_8B, LLAMA_1B))],
    ids=lambda value: f"{value['hidden']}" if isinstance(value, dict) else value or "16",
)
def test_the_decode_kernels_compile_for_sm90_without_spills(name, shape, kv):
    geometry = Geometry(name, **shape, kv=kv)
    ku = stage_columns(name, geometry.hidden)
    kernels = (*runner.PRODUCTS.values(), "embed_kernel", *prefill.KERNELS, f"unpack_kernel<{ku}>")
    if name in ("int4_g128", "bf16"):  # attention knows of the format only the activations' dtype
        kernels = (*kernels, *geometry.attentions)
    binary = nvrtc.compile_source(f"{SOURCE}\n{layout_checks()}", kernels, geometry.macros(), "sm_90a")
    assert set(binary.names) == set(kernels)
    found = binary.resources()
    assert set(found) == set(binary.names.values())
    threads = {name: geometry.threads if name.startswith("product") else 256 for name in kernels}
    for kernel, mangled in binary.names.items():
        registers, spilled = found[mangled]
        assert spilled == 0, kernel
        assert registers * threads[kernel] <= 65536, kernel


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [*((name, LLAMA_8B, 8) for name in LAYOUTS), ("int4_g128", LLAMA_1B, 3)],
    ids=lambda value: f"{value['hidden']}" if isinstance(value, dict) else value,
)
def test_the_kernels_for_several_sequences_compile_for_sm90_without_spills(name, shape, count):
    geometry = Geometry(name, **shape, batch=count)
    kernels = batch.kernels(geometry) if count == 8 else (*runner.kernels(geometry), *prefill.KERNELS)
    source = nvrtc.read_sources("ptx", *runner.sources(geometry), "prefill")
    binary = nvrtc.compile_source(f"{source}\n{layout_checks(SEVERAL)}", kernels, geometry.macros(), "sm_90a")
    found = binary.resources()
    threads = {"batch": geometry.threads, "normalize": batch.NORM_THREADS}
    for kernel, mangled in binary.names.items():
        registers, spilled = found[mangled]
        assert spilled == 0, kernel
        assert registers * threads.get(kernel.split("_")[0], 256) <= 65536, kernel


def test_a_compiled_source_is_kept_by_its_hash_and_compiled_again_if_half_written(tmp_path):
    source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }'

    def build(factor=2, **changes):
        told = []
        options = {"folder": tmp_path, "progress": told.append} | changes
        made = nvrtc.compile_source(source, ("twice",), {"FACTOR": factor}, "sm_90a", **options)
        return made, told

    first, told = build()
    assert told == ["compiling lowbit's kernels for sm_90a, once"]
    assert first.names == {"twice": "twice"}
    again, told = build()
    assert (told, again.cubin, again.names) == ([], first.cubin, first.names)
    _, told = build(factor=3)
    assert told  # other macros are another binary
    for path in tmp_path.glob("*.cubin"):
        path.write_bytes(path.read_bytes()[:-1])
    repaired, told = build()
    assert told
    assert repaired.cubin == first.cubin
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".cubin", ".json")]  # no partial files


def test_a_reduction_is_the_whole_warps():
    """One with a mask of its own for each half has a warp run as two halves (SASS: WARPSYNC.EXCLUSIVE)."""
    found = re.findall(r"redux\.sync\.\S+ %0, %1, (\S+);", nvrtc.read_sources("ptx", "common", "decode", "product"))
    assert found == ["-1", "-1"]


def test_a_compile_error_is_told_in_the_compilers_words():
    with pytest.raises(LowbitError, match=r"could not compile[\s\S]*undefined_thing"):
        nvrtc.compile_source("__global__ void k() { undefined_thing(); }", ("k",), {}, "sm_90a")


def test_the_cache_lies_where_caches_lie(tmp_path):
    assert nvrtc.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "lowbit" / "kernels"
    assert nvrtc.cache_folder({}).parts[-3:] == (".cache", "lowbit", "kernels")
