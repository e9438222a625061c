"""Single products: who takes part at which shapes, what is timed and checked, and the table and file around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit import contenders, device, products
from lowbit.backends import Shape
from lowbit.contenders import Contender
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.kernels import WEIGHT_FORMATS, dispatch, weights
from lowbit.pytest_plugin import products as plugin
from lowbit.report.products import table

SHAPE = Shape("q_proj", 16, 128)
READ_GB_S = 10.0


def contender(name: str) -> Contender:
    return next(each for each in contenders.contenders() if each.id == name)


def config(**changes):
    """What is read of a LlamaConfig."""
    fields = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 32, "vocab_size": 512}
    return SimpleNamespace(**fields | {"num_attention_heads": 8, "num_key_value_heads": 2} | changes)


@pytest.fixture
def here() -> device.Device:
    return device.of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(products, "_median", lambda sample: sample())


# -- who and where -----------------------------------------------------------------------------------------------------


def test_every_weight_format_of_ours_takes_part_beside_the_libraries():
    known = contenders.contenders()
    names = [each.id for each in known]
    assert len(set(names)) == len(names)
    assert {each.format.scheme for each in known if each.format.backend == "lowbit"} == set(WEIGHT_FORMATS)
    assert {each.format.backend for each in known} == set(contenders.LIBRARIES)
    assert "a16w158_rsr-lowbit" in names
    for row in FORMATS.values():
        if row.parts or row.kv or row.calibration_windows:
            assert row.id not in names


def test_the_shapes_are_those_of_a_llama_each_once():
    found = contenders.products(config())
    assert [tuple(shape) for shape in found] == [
        ("q_proj", 256, 256),
        ("k_proj", 64, 256),
        ("gate_proj", 768, 256),
        ("down_proj", 256, 768),
        ("lm_head", 512, 256),
    ]
    square = contenders.products(config(num_key_value_heads=8))
    assert [shape.name for shape in square] == ["q_proj", "gate_proj", "down_proj", "lm_head"]
    assert contenders.ids([contender("a16w8-lowbit")], found)[:2] == ["a16w8-lowbit-q_proj", "a16w8-lowbit-k_proj"]


# -- one product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16-torch", "a16w4_g128-lowbit", "a16w158-lowbit", "a16w158_rsr-lowbit"])
def test_a_product_is_timed_at_every_batch_with_its_bytes(here, name):
    found = products.measure(contender(name), SHAPE, here, READ_GB_S)
    assert [timing.batch for timing in found] == list(products.BATCHES)
    for timing in found:
        assert (timing.contender, timing.product, timing.n, timing.k) == (name, *SHAPE)
        moved = timing.weight_bytes + timing.batch * (16 + 128) * 2
        assert timing.gb_s == pytest.approx(moved / timing.us / 1e3)
        assert timing.share == pytest.approx(timing.gb_s / READ_GB_S)
        assert (timing.how, timing.copies, timing.cached) == ("eager", 1, True)
        assert 0 <= timing.error < 2**-7
    expected = {"bf16-torch": 16 * 128 * 2, "a16w4_g128-lowbit": 16 * (64 + 4), "a16w158-lowbit": 16 * (32 + 4)}
    if name in expected:
        assert found[0].weight_bytes == expected[name]
    assert found[0].kernel == (dispatch.REFERENCE if name in ("a16w4_g128-lowbit", "a16w158-lowbit") else None)


def test_pytest_benchmark_is_given_rounds_of_batch_1(here):
    calls = []

    def rounds(target, rounds, warmup_rounds):
        calls.append((rounds, warmup_rounds))
        target()

    products.measure(contender("a16w8-lowbit"), SHAPE, here, READ_GB_S, rounds)
    assert calls == [(5, 1)]


def test_a_wrong_kernel_is_not_timed(here):
    dispatch.register("linear", "off", lambda asked: asked.rows == 4, lambda x, w, d: 1.1 * weights.matmul(x, w).to(d))
    try:
        with pytest.raises(LowbitError, match=r"a16w8-lowbit at q_proj \[16, 128\], batch 4: .* got 0\.(1|09)"):
            products.measure(contender("a16w8-lowbit"), SHAPE, here, READ_GB_S)
    finally:
        dispatch.unregister("linear", "off")


def test_a_row_that_quantizes_activations_is_timed_but_not_compared(here):
    (first, *_) = products.measure(contender("a8w8-torchao"), SHAPE, here, READ_GB_S)
    assert first.error is None
    assert first.us > 0


def test_a_dtype_that_the_device_lacks_is_refused(here):
    lacking = SimpleNamespace(name="an old card", dtype_for=lambda fmt: None)
    with pytest.raises(LowbitError, match="bf16-lowbit needs one of bf16 on an old card"):
        products.Prepared(contender("bf16-lowbit"), SHAPE, lacking)


# -- what is printed, and when -----------------------------------------------------------------------------------------


def timing(name="a", batch=1, us=2.0, product="q_proj", **fields):
    row = {"contender": name, "product": product, "n": 16, "k": 128, "batch": batch, "us": us, "gb_s": 5.0}
    return row | {"share": 0.5, "cached": False, "how": "CUDA graph", "kernel": None} | fields


def test_the_table_has_a_line_per_kernel_and_shape_the_fastest_first():
    rows = [
        timing("slow", us=9.0),
        timing("slow", batch=8, us=1.0),
        timing("fast", kernel="a kernel"),
        timing("fast", batch=8, us=4.0),
    ]
    lines = table([*rows, timing("slow", product="down_proj", cached=True)], 10)
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["q_proj", "16×128", "fast"],
        ["q_proj", "16×128", "slow"],
        ["down_proj", "16×128", "slow"],
    ]
    assert "a kernel, CUDA graph" in lines[2]
    assert "5.00*" in lines[4]
    assert lines[-1].startswith("* all copies of the weight fit a cache")
    assert "of the read bandwidth of this run, 10 GB/s" in lines[-2]
    assert table([], 10) == []


@pytest.mark.parametrize(
    ("words", "mark", "ignored"),
    [
        (["benches"], "", True),
        ([], "", True),
        (["benches/test_kernels.py"], "", None),
        (["benches/test_kernels.py::test_kernels[a]"], "", None),
        (["benches", "-m", "kernels"], "kernels", None),
    ],
)
def test_products_are_measured_on_request_only(words, mark, ignored):
    config = SimpleNamespace(invocation_params=SimpleNamespace(args=words), option=SimpleNamespace(markexpr=mark))
    assert plugin.pytest_ignore_collect(Path("/x/benches/test_kernels.py"), config) is ignored
    assert plugin.pytest_ignore_collect(Path("/x/benches/test_decode.py"), config) is None
    assert plugin.pytest_ignore_collect(Path("/x/other/test_kernels.py"), config) is None


def test_kernels_are_found_by_the_words_that_find_cases():
    kernel = SimpleNamespace(
        fixturenames=["measure_product"],
        callspec=SimpleNamespace(params={"contender": "a16w4_g128-torchao"}),
        extra_keyword_matches=set(),
    )
    plugin.pytest_collection_modifyitems([SimpleNamespace(fixturenames=[]), kernel])
    assert {"int4", "W4A16", "torchao", "g128"} <= kernel.extra_keyword_matches
