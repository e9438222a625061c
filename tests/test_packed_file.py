"""Packed weights on disk: bit for bit there and back, and every file that is not one is refused by name."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit import packed_file
from lowbit.backends import coverage, native
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.kernels import WEIGHT_FORMATS

ROWS = [row for row in FORMATS.values() if row.backend == "lowbit"]
IDS = torch.arange(32).view(2, 16)


def model(**changes):
    """The tiny model with RoPE's frequencies in fp32, as lowbit builds models; no file holds them."""
    made = tiny.model(**changes)
    made.model.rotary_emb = type(made.model.rotary_emb)(made.config)
    return made


def quantized(fmt, **changes):
    made = model(**changes)
    for layer in made.model.layers:
        native.quantize(layer, fmt, torch.bfloat16)
    holder = nn.ModuleDict({"lm_head": made.lm_head})
    native.quantize(holder, fmt, torch.bfloat16)
    made.lm_head = holder["lm_head"]
    return made


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "packed.safetensors"
    packed_file.save(quantized(FORMATS["a16w4_g128-lowbit"]), path)
    return path


def rewrite(path, change=lambda tensors: None, **metadata):
    """The same file with other tensors or metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        held = file.metadata()
    change(tensors)
    save_file(tensors, path, {key: value for key, value in (held | metadata).items() if value is not None})


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_there_and_back_bit_for_bit(fmt, tmp_path):
    made = quantized(fmt)
    packed_file.save(made, tmp_path / "a" / "packed.safetensors")
    again = packed_file.load(tmp_path / "a" / "packed.safetensors")
    first, second = made.state_dict(), again.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, again(IDS).logits)
    assert coverage.inspect(again, fmt).bits_per_weight == coverage.inspect(made, fmt).bits_per_weight
    assert not again.training
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["packed.safetensors"]  # no draft is left


def test_the_metadata_name_the_formats(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["lowbit"] == "1"
    assert metadata["weight_formats"] == "int4_g128"
    described = json.loads(metadata["packed"])["model.layers.1.mlp.down_proj"]
    assert described == {"format": "int4_g128", "version": WEIGHT_FORMATS["int4_g128"].version, "shape": [256, 768]}


def test_shared_memory_is_stored_once_and_shared_again(tmp_path):
    made = model(tie_word_embeddings=True)
    native.quantize_embedding(made, "int8")
    packed_file.save(made, tmp_path / "packed.safetensors")
    again = packed_file.load(tmp_path / "packed.safetensors")
    assert again.lm_head.codes.data_ptr() == again.model.embed_tokens.codes.data_ptr()
    assert again.model.embed_tokens.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, again(IDS).logits)


def test_a_tied_table_beside_a_packed_head(tmp_path):
    made = quantized(FORMATS["a16w8-lowbit"], tie_word_embeddings=True)
    packed_file.save(made, tmp_path / "packed.safetensors")
    again = packed_file.load(tmp_path / "packed.safetensors")
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, again(IDS).logits)


def test_a_mixed_model(tmp_path):
    made = model()
    native.quantize(made.model.layers[0], FORMATS["a16w8-lowbit"], torch.bfloat16, lambda path: "ternary")
    native.quantize(made.model.layers[1], FORMATS["a16w8-lowbit"], torch.bfloat16)
    packed_file.save(made, tmp_path / "packed.safetensors")
    again = packed_file.load(tmp_path / "packed.safetensors")
    assert again.model.layers[0].mlp.up_proj.format == "ternary"
    assert type(again.lm_head) is nn.Linear
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, part):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(LowbitError, match=r"packed\.safetensors \(\d+ bytes\) is truncated or no safetensors file"):
        packed_file.load(saved)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(LowbitError, match="is truncated or no safetensors file"):
        packed_file.load(path)
    save_file({"weight": torch.zeros(4)}, path, {"format": "pt"})
    with pytest.raises(LowbitError, match=r"not of lowbit's packed weights: expected 'lowbit'.*got \['format'\]"):
        packed_file.load(path)
    with pytest.raises(LowbitError, match="no such file"):
        packed_file.load(tmp_path / "absent.safetensors")


def test_another_layout_is_refused(saved):
    rewrite(saved, lowbit="2")
    with pytest.raises(LowbitError, match="expected layout 1 of lowbit's packed weights, got '2'"):
        packed_file.load(saved)
    rewrite(saved, lowbit="1", config=None)
    with pytest.raises(LowbitError, match=r"got '1' without \['config'\]"):
        packed_file.load(saved)


def test_another_version_of_a_format_is_refused(saved):
    with safe_open(saved, framework="pt") as file:
        packed = json.loads(file.metadata()["packed"])
    packed["lm_head"]["version"] = 7
    rewrite(saved, packed=json.dumps(packed))
    with pytest.raises(LowbitError, match="lm_head is stored in version 7 of int4_g128, this lowbit reads version 1"):
        packed_file.load(saved)
    packed["lm_head"] |= {"format": "int5", "version": 1}
    rewrite(saved, packed=json.dumps(packed))
    with pytest.raises(LowbitError, match="unknown weight format 'int5'"):
        packed_file.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.codes"), r"lm_head\.codes is missing"),
        (lambda tensors: tensors.pop("lm_head.zero"), r"lm_head \[512, 256\] in int4_g128: expected"),
        (lambda tensors: tensors.update({"lm_head.scale": torch.zeros(512, 2)}), r"expected .*torch\.float16.*got"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"missing \['model\.norm\.weight'\]"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"unexpected \['more'\]"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            r"another shape \['model\.norm\.weight'\]",
        ),
    ],
    ids=["no codes", "no zero", "scale of another dtype", "no norm", "one more", "norm of another shape"],
)
def test_tensors_that_are_not_the_models_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(LowbitError, match=message):
        packed_file.load(saved)


def test_a_config_that_does_not_fit_is_refused(saved):
    with safe_open(saved, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(saved, config=json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(LowbitError, match=r"no module model\.layers\.1"):
        packed_file.load(saved)
    rewrite(saved, config=json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(
        LowbitError, match=r"lm_head: expected shape \[500, 256\] by the file's config, got \[512, 256\]"
    ):
        packed_file.load(saved)


def test_a_model_without_packed_weights_is_not_saved(tmp_path):
    with pytest.raises(LowbitError, match="expected a model with lowbit's packed weights, got one without"):
        packed_file.save(model(), tmp_path / "packed.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_refuses_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    made = quantized(FORMATS["a16w4_g128-lowbit"])
    (tmp_path / "file").touch()
    with pytest.raises(LowbitError, match=r"can't write .*/file/model.safetensors: .*; free space, or choose another"):
        packed_file.save(made, tmp_path / "file" / "model.safetensors")

    def fill_up(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(packed_file, "save_file", fill_up)
    with pytest.raises(LowbitError, match=r"can't write .*: I/O error: No space left on device"):
        packed_file.save(made, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
