from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shapes import LLAMA_8B
from tiny import CPU, gpu, model
from torch import nn

from lowbit import backends, quantized, truth
from lowbit.backends import coverage, recipe, tables
from lowbit.backends.coverage import CoverageError
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, LINEARS, recipes
from lowbit.formats.recipes import Recipe, make, part_of
from lowbit.hostmodel import HostModel
from lowbit.truth import TruthError

INT4, INT8, NF4 = "a16w4_g128-torchao", "a16w8-torchao", "a16w4_nf4_dq-bitsandbytes"
ROWS = [row for row in FORMATS.values() if row.parts]
CPU_ROWS = [row for row in ROWS if "cpu" in row.devices]
TABLE_ROWS = [row for row in FORMATS.values() if row.backend == "tables"]
ROOT = Path(__file__).parent.parent
IDS = torch.arange(32).view(2, 16)


def host(**changes):
    made = model(**changes)
    return HostModel("tiny", "auto", made.config, made, [], 0)


def device(**fields):
    """A CPU that has a torch device."""
    return SimpleNamespace(**vars(CPU) | {"torch": torch.device("cpu"), "dtype_for": CPU.dtype_for} | fields)


def build(fmt, **changes):
    return quantized.build(host(**changes), fmt, device())


def of(parts, name="a16w4_mine", **fields):
    return make(Recipe(name, parts, **fields), FORMATS)


def error_of(made, **changes):
    with torch.no_grad():
        want, got = model(**changes)(IDS).logits.float(), made.model(IDS).logits.float()
    return ((got - want).norm() / want.norm()).item()


# -- which part gets what ----------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_decides():
    fmt = of({"lm_head": INT8, "layers.0.*": "bf16-torch", "layers.-1.*": "bf16-torch", "layers.*": INT4})
    found = {path: part_of(fmt, f"model.layers.{path}.mlp.down_proj", 32) for path in (0, 1, 30, 31)}
    assert found == {0: "bf16-torch", 1: INT4, 30: INT4, 31: "bf16-torch"}
    assert part_of(fmt, "lm_head", 32) == INT8
    assert part_of(fmt, "model.embed_tokens", 32) is None


def test_the_tenth_layer_is_not_the_first():
    fmt = of({"layers.1.*": INT8})
    assert part_of(fmt, "model.layers.1.mlp.up_proj", 32) == INT8
    assert part_of(fmt, "model.layers.10.mlp.up_proj", 32) is None


def test_a_pattern_reaches_the_embedding_only_by_name():
    assert part_of(of({"*": INT8}), "model.embed_tokens", 2) is None
    assert part_of(of({"embed_tokens": "a16w8-tables"}), "model.embed_tokens", 2) == "a16w8-tables"


def test_an_assignment_lists_every_matrix_in_order():
    found = list(recipes.assignment(of({"lm_head": INT8, "layers.*": INT4}), 2))
    assert len(found) == 15
    assert found[0] == ("model.layers.0.self_attn.q_proj", "q_proj", INT4)
    assert found[-1] == ("lm_head", "lm_head", INT8)
    plain = list(recipes.assignment(FORMATS[INT4], 2))
    assert [name for _, name, _ in plain] == [*LINEARS, *LINEARS]


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_a_recipe_of_the_table_is_found_by_its_words(fmt):
    assert fmt.id == f"{fmt.name}-recipe"
    assert fmt.suite in ("nightly", "full")
    libraries = {FORMATS[part].backend for part in fmt.parts.values()}
    assert {"recipe", *libraries, "a16w" + f"{fmt.weight_bits:g}"} <= fmt.selectors


# -- what a row follows from -------------------------------------------------------------------------------------------


def test_a_row_follows_from_its_formats():
    fmt = of({"lm_head": INT8, "*.self_attn.*": "a8w8-torchao", "layers.*": INT4})
    assert (fmt.activation_bits, fmt.weight_bits, fmt.dtypes) == (16, 4, ("bf16",))
    assert fmt.targets == (*LINEARS, "lm_head")
    assert fmt.inductor == {"coordinate_descent_tuning": True, "force_fuse_int_mm_with_mul": True}
    assert fmt.options == {"compiled_min_rows": 17}
    assert of({"*": "a16w8-gemlite"}).devices == ("cuda",)


@pytest.mark.parametrize(
    ("row", "limit"),
    [
        ("a8w8-torchao", "compiled_min_rows"),
        ("a8w8_llmint8-bitsandbytes", "waits_for_host"),
        ("a8w8_mxfp8_emulated-torchao", "cpu_compiler_lacks"),
    ],
)
def test_what_one_part_can_not_be_compiled_for_is_the_whole_models(row, limit):
    assert of({"*.mlp.*": row, "lm_head": INT8}).options == {limit: FORMATS[row].options[limit]}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "recipe a16w4_mine is empty: expected patterns with format ids"),
        ({"*": "int5"}, "recipe a16w4_mine: unknown format 'int5'; of .*a16w5_intx_g32-torchao"),
        ({"layers.*.router": INT8}, r"'layers.\*.router' names no module of a Llama; there are q_proj, .*head"),
        ({"*": "a16w4_g128_head8-recipe"}, "names a16w4_g128_head8-recipe, a recipe itself"),
        (
            {"lm_head": INT4, "*": "fp16-torch"},
            r"share no base dtype, device .*\(a16w4_g128-torchao: bf16",
        ),
        ({"embed_tokens": INT8}, "gives a16w8-torchao to embed_tokens; .*for embed_tokens take a16w8-tables"),
        ({"layers.*": "a16w8-tables"}, "gives a16w8-tables to q_proj, .* it can hold embed_tokens, lm_head"),
    ],
)
def test_a_recipe_that_can_not_be_is_refused(parts, message):
    with pytest.raises(LowbitError, match=message):
        of(parts)


def test_contradicting_inductor_flags_are_refused(monkeypatch):
    other = replace(FORMATS["fp16-torch"], dtypes=("bf16",), inductor={"coordinate_descent_tuning": False})
    with pytest.raises(
        LowbitError, match="wants Inductor's coordinate_descent_tuning = False, another of its formats T"
    ):
        make(Recipe("a16w8_x", {"lm_head": INT8, "*": other.id}), FORMATS | {other.id: other})


# -- a recipe on a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fmt", CPU_ROWS, ids=lambda fmt: fmt.id)
def test_every_recipe_gives_each_part_its_format(fmt, tied):
    made = build(fmt, tie_word_embeddings=tied)
    expected = list(recipes.assignment(fmt, 2))
    assert made.coverage.linears == made.coverage.expected == len(expected)
    modules = dict(made.model.named_modules())
    for path, _, part in expected:
        assert backends.get(FORMATS[part].backend).is_quantized(modules[path])
        assert recipe.is_quantized(modules[path])
    assert made.coverage.parts.keys() == {part for _, _, part in expected}
    for part, found in made.coverage.parts.items():
        assert FORMATS[part].weight_bits <= found["bits_per_weight"] < 1.25 * FORMATS[part].weight_bits * 4 + 1
    assert 0.005 < error_of(made, tie_word_embeddings=tied) < 0.4


def test_two_libraries_in_one_model():
    made = build(of({"*.self_attn.*": INT8, "*.mlp.*": NF4}))
    layer = made.model.model.layers[1]
    assert backends.get("torchao").is_quantized(layer.self_attn.q_proj)
    assert backends.get("bitsandbytes").is_quantized(layer.mlp.up_proj)
    assert made.coverage.parts[INT8]["linears"] == 8
    assert made.coverage.parts[NF4]["linears"] == 6
    assert made.coverage.to_dict()["parts"][NF4]["bits_per_weight"] < 4.6


def test_the_master_is_left_alone():
    source = host(tie_word_embeddings=True)
    before = source.checksum()
    for fmt in CPU_ROWS[:2] + TABLE_ROWS:
        quantized.build(source, fmt, device())
    assert source.checksum() == before


def test_the_first_and_last_layer_stay_as_they_are():
    made = build(FORMATS["a16w4_g128_head8_ends16-recipe"], num_hidden_layers=3)
    plain = model(num_hidden_layers=3)
    for index in (0, 2):
        for name in ("q_proj", "o_proj"):
            ours = getattr(made.model.model.layers[index].self_attn, name).weight
            assert torch.equal(ours, getattr(plain.model.layers[index].self_attn, name).weight)
    assert backends.get("torchao").is_quantized(made.model.model.layers[1].self_attn.q_proj)


def test_a_part_that_was_forgotten_is_found():
    fmt = FORMATS["a16w4_g128_head8-recipe"]
    made = build(fmt).model
    made.model.layers[1].mlp.down_proj = nn.Linear(768, 256, bias=False)
    with pytest.raises(
        CoverageError, match=r"expected 15 .* got 14: model.layers.1.mlp.down_proj \(a16w4_g128-torchao\)"
    ):
        coverage.inspect(made, fmt)


def test_a_part_in_too_many_bits_is_found(monkeypatch):
    fmt = of({"lm_head": INT8, "layers.*": INT4})
    made = build(of({"*": INT8})).model
    monkeypatch.setattr(coverage, "_padding", lambda modules, row: 1.0)
    message = r"a16w4_mine-recipe, its a16w4_g128-torchao: expected at most 6\.00 bits stored per weight, got 8"
    with pytest.raises(CoverageError, match=message):
        coverage.inspect(made, fmt)


@pytest.mark.parametrize("fmt", CPU_ROWS, ids=lambda fmt: fmt.id)
def test_the_kernels_of_every_part_compute_with_their_own_weights(fmt):
    found = truth.prove(build(fmt).model, fmt, torch.bfloat16, model())
    kinds = {(name, part) for _, name, part in recipes.assignment(fmt, 2) if name != "embed_tokens" or "w" in part}
    assert len(found) == len(kinds)
    assert all(one.weight < 0.2 for one in found.values())


def test_a_wrong_kernel_of_one_part_is_found():
    fmt = FORMATS["a16w4_g128_tables8-recipe"]
    made = build(fmt).model
    made.lm_head.scale[3] *= 2  # shared with nothing here: the embedding has a table of its own
    truth.prove(made, fmt, torch.bfloat16)
    gather, made.model.embed_tokens.forward = made.model.embed_tokens.forward, lambda ids: gather(ids.flip(0))
    with pytest.raises(TruthError, match=r"a16w4_g128_tables8-recipe: .*at most 0\.00781.* got model.embed_tokens 1\."):
        truth.prove(made, fmt, torch.bfloat16)


# -- embedding and head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", TABLE_ROWS, ids=lambda fmt: fmt.id)
def test_tables_alone_are_quantized_and_the_linears_are_not(fmt):
    made = build(fmt)
    assert (made.coverage.linears, made.coverage.expected) == (2, 2)
    assert type(made.model.model.layers[0].mlp.up_proj) is nn.Linear
    limit = {8: 0.02, 4: 0.2}[fmt.weight_bits]
    assert limit / 20 < error_of(made) < limit


@pytest.mark.parametrize("fmt", TABLE_ROWS, ids=lambda fmt: fmt.id)
def test_a_quantized_table_gathers_and_multiplies_with_its_own_weights(fmt):
    made = build(fmt).model
    embedding, head = made.model.embed_tokens, made.lm_head
    assert torch.equal(embedding(IDS), tables.dequantize(embedding)[IDS].bfloat16())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 5] = 0, 100.0
    x = x.bfloat16()
    ref = x.double() @ tables.dequantize(head).double().T
    out = head(x)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    errors = (out[::2].double() - ref[::2]).norm(dim=1) / ref[::2].norm(dim=1)
    assert errors.max() < 2**-8


@pytest.mark.parametrize("fmt", TABLE_ROWS, ids=lambda fmt: fmt.id)
def test_a_tied_pair_shares_one_table(fmt):
    tied, untied = build(fmt, tie_word_embeddings=True), build(fmt)
    assert tied.model.lm_head.codes is tied.model.model.embed_tokens.codes
    assert tied.coverage.weight_bytes * 2 == untied.coverage.weight_bytes
    assert tied.coverage.bits_per_weight == untied.coverage.bits_per_weight
    # one token reads the head, tied or not, and one row of the embedding
    assert tied.coverage.streamed_bytes == tied.coverage.resident_bytes == untied.coverage.streamed_bytes
    assert untied.coverage.resident_bytes - untied.coverage.streamed_bytes == tied.coverage.weight_bytes


def test_a_tied_head_that_is_quantized_alone_leaves_the_embedding():
    fmt = FORMATS["a16w4_g128_head8-recipe"]
    tied, untied = build(fmt, tie_word_embeddings=True), build(fmt)
    assert tied.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert tied.coverage.resident_bytes == untied.coverage.resident_bytes
    assert tied.coverage.resident_bytes - tied.coverage.streamed_bytes == 512 * 256 * 2


def test_a_smaller_head_streams_fewer_bytes():
    streamed = {
        name: build(FORMATS[name]).coverage.streamed_bytes
        for name in (INT4, "a16w4_g128_head8-recipe", "a16w4_g128_tables4-recipe")
    }
    assert streamed[INT4] > streamed["a16w4_g128_head8-recipe"] > streamed["a16w4_g128_tables4-recipe"]
    saved = streamed[INT4] - streamed["a16w4_g128_head8-recipe"]
    assert 0.97 * 512 * 256 < saved < 512 * 256  # one byte of two per weight, less the scales


def test_a_table_is_not_quantized_twice():
    made = build(TABLE_ROWS[0]).model
    holder = nn.ModuleDict({"lm_head": made.lm_head})
    with pytest.raises(LowbitError, match=r"expects plain embed_tokens and lm_head .*fresh copy of the master"):
        tables.quantize(holder, TABLE_ROWS[0], torch.bfloat16)


def test_an_unknown_scheme_of_the_tables_lists_the_known_ones():
    with pytest.raises(LowbitError, match=r"unknown weight format 'int5'; known: .*int4_g64"):
        tables.quantize(
            nn.ModuleDict({"lm_head": nn.Linear(8, 8, bias=False)}),
            replace(TABLE_ROWS[0], scheme="int5"),
            torch.bfloat16,
        )


# -- where it can't run, and memory ------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())


def test_a_part_that_can_not_run_says_which(installed):
    fmt = FORMATS["a16w4_g128_head8-recipe"]
    reason = backends.unmet(fmt, gpu(7, 5), LLAMA_8B)
    assert str(reason) == "capability: needs SM80 (bf16), this is SM75"
    odd = SimpleNamespace(**vars(LLAMA_8B) | {"intermediate_size": 14337})
    reason = backends.unmet(fmt, gpu(9, 0), odd)
    assert str(reason) == "shape: a16w4_g128-torchao: group 128 does not divide down_proj (K=14337)"


def test_only_the_linears_of_a_part_are_asked_about(installed):
    odd = SimpleNamespace(**vars(LLAMA_8B) | {"intermediate_size": 14336 + 64})
    assert backends.unmet(of({"*.self_attn.*": INT4, "*.mlp.*": INT8}), gpu(9, 0), odd) is None


def test_layers_that_the_model_does_not_have_match_nothing(installed):
    assert str(backends.unmet(of({"layers.40.*": INT8}), gpu(9, 0), LLAMA_8B)) == (
        "shape: layers.40.* match nothing in 32 layers"
    )


def test_every_recipe_runs_on_an_h200_in_the_8b_shape(installed):
    h200 = gpu(9, 0, total_mib=143_771)
    assert [row.id for row in ROWS + TABLE_ROWS if backends.unmet(row, h200, LLAMA_8B)] == []


def test_memory_is_foreseen_by_part():
    mib = {name: backends.estimate_mib(FORMATS[name], LLAMA_8B) for name in FORMATS}
    table = 128256 * 4096 / 2**20
    assert mib["bf16-torch"] == pytest.approx(15_316, abs=1)
    assert mib[INT4] - mib["a16w4_g128_head8-recipe"] == pytest.approx(table * (2 - 8.5 / 8))
    assert mib[INT4] - mib["a16w4_g128_tables4-recipe"] == pytest.approx(2 * table * (2 - 4.25 / 8))
    tied = SimpleNamespace(**vars(LLAMA_8B) | {"tie_word_embeddings": True})
    assert mib["a16w4_g128_tables4-recipe"] - backends.estimate_mib(
        FORMATS["a16w4_g128_tables4-recipe"], tied
    ) == pytest.approx(table * 4.25 / 8)
    assert backends.estimate_mib(FORMATS["a16w4_g128_head8-recipe"], tied) == pytest.approx(
        mib["a16w4_g128_head8-recipe"]
    )


# -- a user's own ------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "parts": {"lm_head": INT8, "layers.*": INT4}, "note": "a trial"}))
    fmt = recipes.read(path, FORMATS)
    assert (fmt.id, fmt.suite, fmt.note, dict(fmt.parts)) == (
        "mine-recipe",
        "quick",
        "a trial",
        {"lm_head": INT8, "layers.*": INT4},
    )
    assert build(fmt).coverage.linears == 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"can't be read: No such file or directory$"),
        ("{", "no JSON: Expecting property name"),
        ("[]", "got name None"),
        ('{"name": "a-b", "parts": {}}', "got name 'a-b'"),
        ('{"name": "mine", "parts": ["int4"]}', r"got parts \['int4'\]"),
        ('{"name": "mine", "parts": {"*": "int5"}}', "recipe mine: unknown format 'int5'"),
    ],
)
def test_a_file_that_is_no_recipe_says_what_was_expected(tmp_path, content, message):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LowbitError, match=message):
        recipes.read(path, FORMATS)


def collect(tmp_path, content, *args):
    path = tmp_path / "mine.json"
    path.write_text(content)
    command = [sys.executable, "-m", "pytest", "benches", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["--model", "embedded", "--recipe", str(path), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_a_recipe_of_ones_own_is_a_case_like_the_others(tmp_path):
    found = collect(tmp_path, json.dumps({"name": "mine", "parts": {"lm_head": INT8}}), "-k", "mine")
    assert "benches/test_decode.py::test_decode[mine-recipe-reduce-overhead-b1_c0]" in found.stdout
    assert "benches/test_quality.py::test_quality[mine-recipe]" in found.stdout
    assert "[bf16-torch" not in found.stdout


def test_a_recipe_that_is_none_is_wrong_usage(tmp_path):
    found = collect(tmp_path, "{}")
    assert found.returncode == 4
    assert "--recipe: recipe" in found.stderr
    assert "got name None" in found.stderr


def test_a_recipe_needs_what_its_formats_need():
    assert backends.needs(FORMATS["a16w4_g128_gemlite_head8-recipe"]) == "SM75; gemlite, triton, hqq"
    assert backends.needs(FORMATS["a16w4_g128_head8-recipe"]) == "CPU or SM80"
