from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from lowbit import checkpoint
from lowbit.errors import LowbitError
from lowbit.quiet import quiet_import


@pytest.fixture
def folder(tmp_path):
    return tiny_llama.save(tmp_path / "tiny")


def entries_of(folder):
    config = checkpoint.read_config(folder)
    return checkpoint.match(checkpoint.read_index(folder), config, folder)


def refusal(call, *args):
    with pytest.raises(LowbitError) as caught:
        call(*args)
    return str(caught.value)


# -- config.json --------------------------------------------------------------------------------------------------


def test_a_missing_folder_or_config_is_named(tmp_path):
    assert "no folder there" in refusal(checkpoint.read_config, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refusal(checkpoint.read_config, tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ('{"model_type": "lla', "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected model_type 'llama', got None"),
        ('{"model_type": "qwen3"}', "got 'qwen3'"),
        ('{"model_type": "llama", "auto_map": {}}', "never does"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "already quantized (fp8)"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 8}', "not a multiple"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "ZeroDivisionError"),
        ('{"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}', "factor"),
        ('{"model_type": "llama", "rope_scaling": {"rope_type": "spiral", "factor": 2}}', "spiral"),
    ],
)
def test_a_config_that_is_no_plain_llama_is_refused(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    message = refusal(checkpoint.read_config, tmp_path)
    assert expected in message
    assert str(tmp_path) in message


def test_a_config_of_transformers_4_gives_the_same_frequencies(folder, tmp_path):
    rope = dict(tiny_llama.LLAMA3_ROPE)
    theta = rope.pop("rope_theta")
    new = checkpoint.read_config(folder)
    tiny_llama.edit_config(
        folder, "rope_parameters", "dtype", rope_scaling=rope, rope_theta=theta, torch_dtype="bfloat16"
    )
    old = checkpoint.read_config(folder)
    rotary = quiet_import("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    assert torch.equal(rotary(old).inv_freq, rotary(new).inv_freq)
    assert old.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
    ],
)
def test_the_shapes_are_those_of_the_model(changes):
    transformers = quiet_import("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, **changes
    )
    model = transformers.LlamaForCausalLM(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert checkpoint.parameter_shapes(config) == expected


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_every_byte_is_read_sharded_or_not(tmp_path, shard):
    folder = tiny_llama.save(tmp_path / "tiny", shard=shard)
    files = checkpoint.weight_files(folder)
    assert len(files) == 1 if shard == "1GB" else len(files) > 2
    stored = {name: tensor for path in files for name, tensor in load_file(path).items()}
    entries = entries_of(folder)
    assert entries.keys() == stored.keys()
    for name, entry in entries.items():
        data = np.empty(entry.spec.nbytes, dtype=np.uint8)
        checkpoint.read_bytes(entry, data[:100])
        checkpoint.read_bytes(entry, data[100:], 100)
        assert torch.equal(torch.from_numpy(data).view(entry.spec.dtype).view(entry.spec.shape), stored[name])


def test_a_folder_without_weights_is_told_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    assert "--load-format dummy" in refusal(checkpoint.weight_files, folder)


def test_pickles_are_never_opened(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(b"\x80\x04boom")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    message = refusal(checkpoint.weight_files, folder)
    assert "consolidated.00.pth, pytorch_model-00001-of-00002.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_a_cut_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(checkpoint.read_index, folder)
    assert "model.safetensors" in message
    assert "truncated" in message


def test_a_file_that_is_something_else_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(5000))
    assert "no safetensors file" in refusal(checkpoint.read_index, folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(checkpoint.read_index, folder)


def test_a_file_cut_while_it_is_read_is_an_error(folder):
    entry = entries_of(folder)["lm_head.weight"]
    entry.path.write_bytes(entry.path.read_bytes()[: entry.offset + 10])
    assert "became shorter" in refusal(checkpoint.read_bytes, entry, np.empty(entry.spec.nbytes, dtype=np.uint8))


def test_missing_shards_are_named(tmp_path):
    folder = tiny_llama.save(tmp_path / "tiny", shard="40KB")
    files = checkpoint.weight_files(folder)
    files[1].unlink()
    message = refusal(checkpoint.weight_files, folder)
    assert f"1 of {len(files)} shards are missing: {files[1].name}" in message


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
    ],
)
def test_a_broken_index_is_refused(folder, index, expected):
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    assert expected in refusal(checkpoint.weight_files, folder)


def test_the_same_tensor_twice_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "b.safetensors")
    assert "lm_head.weight is in both a.safetensors and b.safetensors" in refusal(checkpoint.read_index, folder)


def test_quantized_tensors_are_refused(folder):
    def quantize(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    tiny_llama.edit_weights(folder, quantize)
    assert re.search(r"lm_head\.weight is stored as F8_E4M3.*BF16", refusal(checkpoint.read_index, folder))


def test_missing_unexpected_and_misshapen_tensors_come_in_one_error(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 64)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(96, 64)

    tiny_llama.edit_weights(folder, spoil)
    message = refusal(entries_of, folder)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight (expected [96, 64], got [2, 64])" in message


def test_a_long_list_is_cut(folder):
    tiny_llama.edit_config(folder, num_hidden_layers=9)
    assert "63 missing" in (message := refusal(entries_of, folder))
    assert "and 59 more" in message
    assert len(message) < 600


def test_frequencies_of_old_files_and_bare_models_are_understood(folder):
    expected = set(entries_of(folder)) - {"lm_head.weight"}

    def rewrite(tensors):
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    tiny_llama.edit_weights(tiny_llama.edit_config(folder, tie_word_embeddings=True), rewrite)
    assert set(entries_of(folder)) == expected
