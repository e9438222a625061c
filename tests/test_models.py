from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny_llama
import torch
from huggingface_hub import errors
from live_bytes import LiveBytes
from torch import nn

from lowbit import hostmemory, hostmodel, hub, loading, models
from lowbit.errors import LowbitError
from lowbit.presets import LLAMA_8B_IDS
from lowbit.quiet import quiet_import

CPU = torch.device("cpu")
NO_GPU = SimpleNamespace(kind="cpu", total_mib=None)
IDS = torch.arange(2 * 40).view(2, 40) * 7 % 128


def gpu(total_mib):
    return SimpleNamespace(kind="cuda", total_mib=total_mib)


@pytest.fixture
def env(tmp_path):
    """An empty Hugging Face cache."""
    return {"HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def folder(tmp_path):
    return tiny_llama.save(tmp_path / "Tiny Llama_v1")


def load(folder, load_format="auto", **fields):
    return models.load(models.choose(str(folder), load_format, NO_GPU, {}), **fields)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def from_pretrained(folder, dtype):
    return quiet_import("transformers").LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def cached(env, hub_id, make):
    """Lay a model into the cache as the hub's own client does."""
    commit = "0" * 40
    root = Path(env["HF_HOME"]) / "hub" / f"models--{hub_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return make(root / "snapshots" / commit)


# -- choose -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "factor", "tied"),
    [
        ("llama-3.1-8b", 8_030_261_248, 8, False),
        ("llama-3.2-1b", 1_235_814_400, 32, True),
        ("llama-3.2-3b", 3_212_749_824, 32, True),
    ],
)
def test_presets_have_the_true_shapes_without_the_hub(no_network, env, name, parameters, factor, tied):
    choice = models.choose(name, "dummy", NO_GPU, env)
    assert (choice.name, choice.load_format, choice.source) == (name, "dummy", None)
    assert choice.parameters == parameters  # as the model cards say
    config = choice.config
    assert config.rope_parameters["factor"] == factor
    assert config.rope_parameters["original_max_position_embeddings"] == 8192
    assert (config.tie_word_embeddings, config.max_position_embeddings, config.rms_norm_eps) == (tied, 131072, 1e-5)
    assert models.choose(models.PRESETS[name].hub_id, "dummy", NO_GPU, env).name == name


def test_without_a_gpu_auto_is_the_embedded_model(env):
    choice = models.choose("auto", "auto", NO_GPU, env)
    assert (choice.name, choice.load_format) == ("embedded", "auto")
    assert "no GPU" in choice.why
    assert choice.source is not None


def test_lowbit_model_decides_auto_and_nothing_else(env, folder):
    choice = models.choose("auto", "dummy", NO_GPU, env | {"LOWBIT_MODEL": str(folder)})
    assert choice.source == folder
    assert "LOWBIT_MODEL" in choice.why
    assert models.choose("embedded", "auto", NO_GPU, env | {"LOWBIT_MODEL": "llama-3.1-8b"}).name == "embedded"
    with pytest.raises(LowbitError, match="LOWBIT_MODEL"):
        models.choose("auto", "auto", NO_GPU, env | {"LOWBIT_MODEL": "auto"})


@pytest.mark.parametrize(
    ("total_mib", "name", "load_format"),
    [
        (141_000, "llama-3.1-8b", "dummy"),
        (24_000, "llama-3.1-8b", "dummy"),
        (16_384, "llama-3.2-3b", "dummy"),
        (8_192, "llama-3.2-3b", "dummy"),
        (6_000, "llama-3.2-1b", "dummy"),
        (2_000, "embedded", "auto"),
    ],
)
def test_on_a_gpu_auto_is_the_largest_preset_that_fits(no_network, env, total_mib, name, load_format):
    choice = models.choose("auto", "auto", gpu(total_mib), env)
    assert (choice.name, choice.load_format) == (name, load_format)
    assert "no Llama-3.1-8B in the local Hugging Face cache" in choice.why
    assert str(total_mib) in choice.why


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        (LLAMA_8B_IDS[0], "llama-3.1-8b"),
        (LLAMA_8B_IDS[1], "meta-llama-meta-llama-3.1-8b"),
        (LLAMA_8B_IDS[2], "meta-llama-llama-3.1-8b-instruct"),
    ],
)
def test_on_a_gpu_auto_takes_a_cached_8b(no_network, env, variable, hub_id, name):
    snapshot = cached(env, hub_id, tiny_llama.save)
    if variable == "HF_HUB_CACHE":
        env = {"HF_HUB_CACHE": env["HF_HOME"] + "/hub", "HF_HOME": "/nowhere"}
    choice = models.choose("auto", "auto", gpu(24_000), env)
    assert (choice.name, choice.load_format, choice.source) == (name, "auto", snapshot)
    assert hub_id in choice.why
    assert models.load(choice).parameters == choice.parameters
    assert models.choose("auto", "dummy", gpu(24_000), env).load_format == "dummy"


def test_a_broken_off_download_is_not_taken(no_network, env):
    snapshot = cached(env, LLAMA_8B_IDS[0], lambda path: tiny_llama.save(path, shard="40KB"))
    next(snapshot.glob("model-00002*")).unlink()
    assert models.choose("auto", "auto", gpu(24_000), env).load_format == "dummy"


def test_a_folder_is_named_after_itself(folder, env, monkeypatch):
    choice = models.choose(str(folder), "auto", NO_GPU, env)
    assert (choice.name, choice.source, choice.load_format) == ("tiny-llama-v1", folder, "auto")
    monkeypatch.chdir(folder)
    assert models.choose(".", "auto", NO_GPU, env).name == "tiny-llama-v1"
    snapshot = cached(env, "some/Model", tiny_llama.save)
    assert models.choose(str(snapshot), "auto", NO_GPU, env).name == "some-model"


@pytest.mark.parametrize(
    ("option", "load_format", "expected"),
    [
        ("lama", "auto", "unknown model 'lama'; known: auto, embedded, llama-3.1-8b, llama-3.2-1b, llama-3.2-3b"),
        ("", "auto", "unknown model ''"),
        ("embedded", "pickle", "unknown load format 'pickle'; known: auto, dummy"),
        ("./nowhere", "auto", "no folder there"),
        ("/nowhere/at/all", "dummy", "no folder there"),
        ("a/b/c", "auto", "no hub id either"),
        ("org/na me", "auto", "no hub id either"),
    ],
)
def test_what_is_no_model_is_refused(no_network, env, option, load_format, expected):
    with pytest.raises(LowbitError) as caught:
        models.choose(option, load_format, NO_GPU, env)
    assert expected in str(caught.value)


def test_a_file_is_no_folder(env, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LowbitError, match=r"model\.gguf.*expected a folder"):
        models.choose(str(tmp_path / "model.gguf"), "auto", NO_GPU, env)


def test_a_folder_without_weights_is_refused_before_loading_unless_dummy(folder, env):
    (folder / "model.safetensors").unlink()
    with pytest.raises(LowbitError, match="no weights"):
        models.choose(str(folder), "auto", NO_GPU, env)
    assert load(folder, "dummy").load_format == "dummy"


def test_a_folder_whose_files_are_cut_or_do_not_fit_is_refused_before_loading(folder, env):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(LowbitError, match="is truncated or no safetensors file"):
        models.choose(str(folder), "auto", NO_GPU, env)
    path.write_bytes(whole)
    tiny_llama.edit_config(folder, num_hidden_layers=3)
    with pytest.raises(LowbitError, match=r"don't fit its config.json; 9 missing: model.layers.2"):
        models.choose(str(folder), "auto", NO_GPU, env)


# -- the hub ------------------------------------------------------------------------------------------------------


def http_error(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("403 Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http_error(errors.GatedRepoError), "the model is gated"),
        (http_error(errors.RepositoryNotFoundError), "no such model on the hub, or a private one"),
        (http_error(errors.HfHubHTTPError), "the download failed (HfHubHTTPError: 403 Client Error)"),
        (errors.LocalEntryNotFoundError("x"), "not in the local cache"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("refused"), "the hub can't be reached (refused)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "the download failed (RuntimeError: no text)"),
    ],
)
@pytest.mark.parametrize("option", ["meta-llama/Llama-3.1-8B", "org/other"])
def test_a_hub_id_that_cant_be_had_names_three_ways_out(monkeypatch, env, option, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LowbitError) as caught:
        models.load(models.choose(option, "auto", NO_GPU, env))
    message = str(caught.value)
    assert f"--model {option}" in message
    assert reason in message
    for way in ("hf auth login", "local folder", "--load-format dummy"):
        assert way in message


def test_offline_for_real_gives_the_same_error(monkeypatch, env):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LowbitError, match=r"can't be reached.*hf auth login.*--load-format dummy"):
        models.choose("some-org/some-model", "auto", NO_GPU, env)


def test_only_safetensors_json_and_the_tokenizer_are_asked_for(monkeypatch, env, folder):
    asked = []

    def answer(hub_id, *, allow_patterns, cache_dir):
        asked.append((hub_id, tuple(allow_patterns), cache_dir))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    choice = models.choose("org/Some_Model", "auto", NO_GPU, env)
    assert choice.name == "org-some-model"
    assert models.load(choice).parameters == choice.parameters
    cache = Path(env["HF_HOME"]) / "hub"
    assert asked == [("org/Some_Model", hub.CONFIG_FILES, cache), ("org/Some_Model", hub.FILES, cache)]
    allowed = [*hub.FILES]
    assert list(
        huggingface_hub.utils.filter_repo_objects(
            ["model.safetensors", "pytorch_model.bin", "modeling_x.py", "original/consolidated.00.pth", "config.json"],
            allow_patterns=allowed,
        )
    ) == ["model.safetensors", "config.json"]


# -- load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"shard": "40KB"},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["plain", "sharded", "tied", "head_dim", "biases"],
)
def test_logits_equal_those_of_transformers_to_the_bit(tmp_path, variant, dtype):
    folder = tiny_llama.save(tmp_path / "tiny", **variant)
    host = load(folder)
    model = host.build(CPU, dtype)
    assert host.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    assert torch.equal(logits(model), logits(from_pretrained(folder, dtype)))
    assert host.parameters == sum(p.numel() for p in model.parameters())
    assert host.checkpoint_bytes == 2 * host.parameters
    assert host.load_s > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_files_type_is_kept_in_host_memory(tmp_path, dtype):
    folder = tiny_llama.save(tmp_path / "tiny", dtype=dtype)
    host = load(folder)
    assert host.dtype == dtype
    assert host.checkpoint_bytes == dtype.itemsize * host.parameters
    assert torch.equal(logits(host.build(CPU, torch.bfloat16)), logits(from_pretrained(folder, torch.bfloat16)))


def test_rope_frequencies_stay_fp32(folder):
    host = load(folder)
    for model in (host.master, host.build(CPU, torch.bfloat16)):
        assert {b.dtype for b in model.buffers()} == {torch.float32}
    reference = from_pretrained(folder, torch.bfloat16).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, reference)


@pytest.mark.parametrize("stored", ["embed_tokens", "lm_head", "both"])
def test_a_tied_head_may_be_stored_under_either_name(tmp_path, stored):
    folder = tiny_llama.save(tmp_path / "tiny", tie_word_embeddings=True)
    expected = logits(from_pretrained(folder, torch.float32))

    def rename(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        if stored != "embed_tokens":
            tensors["lm_head.weight"] = embedding.clone()
        if stored == "lm_head":
            del tensors["model.embed_tokens.weight"]

    host = load(tiny_llama.edit_weights(folder, rename))
    model = host.build(CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    assert host.parameters == models.choose(str(folder), "auto", NO_GPU, {}).parameters


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    folder = tiny_llama.save(tmp_path / "tiny", tie_word_embeddings=True)

    def add_other(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    tiny_llama.edit_weights(folder, add_other)
    with pytest.raises(LowbitError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        load(folder)


def test_the_tokenizer_is_read_or_absent(folder):
    assert load(folder).tokenizer is None
    tiny_llama.add_tokenizer(folder)
    assert load(folder).tokenizer.encode("once upon a time") == [1, 2, 3, 4]
    assert load(folder, "dummy").tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LowbitError, match="tokenizer"):
        load(folder)


def test_progress_counts_the_layers(folder):
    texts = []
    load(folder, progress=texts.append)
    assert texts == [
        "loading tiny-llama-v1: 1 of 2 layers",
        "loading tiny-llama-v1: 2 of 2 layers",
        "loading tiny-llama-v1: the head",
    ]


def test_too_little_host_memory_is_said_before_any_is_taken(folder, monkeypatch):
    monkeypatch.setattr(loading, "available_bytes", lambda: 1000)
    with pytest.raises(LowbitError, match=r"GiB of host memory.*--model embedded"):
        load(folder)
    assert (hostmemory.available_bytes() or 1) > 0


def test_an_error_while_reading_stops_the_load(folder, monkeypatch):
    def fail(*_):
        raise LowbitError("disk on fire")

    monkeypatch.setattr(loading.checkpoint, "read_bytes", fail)
    with pytest.raises(LowbitError, match="disk on fire"):
        load(folder)


# -- dummy --------------------------------------------------------------------------------------------------------


def test_dummy_weights_have_the_shape_the_names_and_the_same_bits_each_time(folder, monkeypatch):
    first = load(folder, "dummy")
    monkeypatch.setattr(loading, "worker_count", lambda: 1)
    monkeypatch.setattr(loading, "PIECE", 1000)
    second = load(folder, "dummy")
    assert first.checksum() == second.checksum()
    assert first.checksum() != load(folder).checksum()
    assert {n: p.shape for n, p in first.master.named_parameters()} == {
        n: p.shape for n, p in load(folder).master.named_parameters()
    }
    model = first.build(CPU, torch.float32)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.norm.weight == 1).all()
    assert logits(model).isfinite().all()


# -- the master ---------------------------------------------------------------------------------------------------


def scale_in_place(module):
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def convert(module):
    module.to(torch.float64)


def quantize_with_torchao(module):
    api = quiet_import("torchao.quantization")
    api.quantize_(module, api.Int8WeightOnlyConfig(set_inductor_config=False))


def delete_originals(module):
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.weight.data = torch.empty(0)


@pytest.mark.parametrize("transform", [None, scale_in_place, convert, quantize_with_torchao, delete_originals])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_transform_can_touch_the_master(tmp_path, transform, tied, dtype):
    host = load(tiny_llama.save(tmp_path / "tiny", tie_word_embeddings=tied))
    before, fresh = host.checksum(), logits(host.build(CPU, torch.bfloat16))
    host.build(CPU, dtype, transform, tables=("lm_head",))
    assert host.checksum() == before
    assert torch.equal(logits(host.build(CPU, torch.bfloat16)), fresh)


def test_the_checksum_sees_one_bit_a_swap_and_a_type(folder):
    host = load(folder)
    before = host.checksum()
    layer = host.master.model.layers[1].mlp
    bits = layer.up_proj.weight.data.view(torch.int16)
    bits[3, 5] ^= 1
    assert host.checksum() != before
    bits[3, 5] ^= 1
    assert host.checksum() == before
    layer.up_proj, layer.gate_proj = layer.gate_proj, layer.up_proj
    assert host.checksum() != before
    layer.up_proj, layer.gate_proj = layer.gate_proj, layer.up_proj
    host.master.to(torch.float32)
    assert host.checksum() != before


def test_a_skeleton_shares_memory_and_can_be_converted(folder):
    host = load(folder)
    before, skeleton = host.checksum(), host.skeleton()
    pointers = {p.data_ptr() for p in host.master.parameters()}
    assert {p.data_ptr() for p in skeleton.parameters()} == pointers
    assert torch.equal(logits(skeleton), logits(host.master))
    skeleton.to(torch.float32)
    skeleton.config.hidden_size = 1
    assert host.checksum() == before
    assert host.master.config.hidden_size == 64


def test_layers_are_copied_one_at_a_time(folder, monkeypatch):
    """The peak is the result plus one layer: a layer has memory of its own once it is transformed, not before."""
    host = load(folder)
    shared = {p.data_ptr() for p in host.master.parameters()}
    seen, copies = [], []
    move = hostmodel._move

    def count(modules, *args):
        copies.append(move(modules, *args))

    def transform(layer):
        assert not shared & {p.data_ptr() for p in layer.parameters()}
        seen.append(layer)
        assert len(copies) == len(seen)

    monkeypatch.setattr(hostmodel, "_move", count)
    texts = []
    model = host.build(CPU, torch.bfloat16, transform, progress=texts.append)
    assert seen == list(model.model.layers)
    assert texts == ["tiny-llama-v1: 1 of 2 layers on cpu", "tiny-llama-v1: 2 of 2 layers on cpu"]
    assert not shared & {p.data_ptr() for p in model.parameters()}


def test_a_table_is_cast_in_pieces_on_a_gpu(monkeypatch):
    """Whole, it would be there in both types, 2 GiB for Llama-3.1-8B; a layer's matrix may be."""
    monkeypatch.setattr(hostmodel, "CAST", 2**12)
    table, matrix, gpu = torch.randn(1000, 64), torch.randn(8, 64), torch.device("meta")
    with LiveBytes() as made:
        cast = hostmodel._copy(table, gpu, torch.float16)
    assert (cast.dtype, cast.shape, cast.device) == (torch.float16, table.shape, gpu)
    assert made.peak == 2 * table.numel() + 4 * 2**12
    with LiveBytes() as made:
        hostmodel._copy(matrix, gpu, torch.float16)
    assert made.peak == 6 * matrix.numel()


def test_many_formats_leave_no_copy_behind(folder):
    """Storages, since a process's resident size is no meter on the CPU."""

    def alive():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu"]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    host = load(folder)
    host.build(CPU, torch.bfloat16, quantize_with_torchao)
    start = alive()
    assert start >= host.checkpoint_bytes
    for _ in range(12):
        host.build(CPU, torch.bfloat16, quantize_with_torchao)
    assert alive() <= start
    kept = host.build(CPU, torch.bfloat16, quantize_with_torchao)
    assert start < alive() < start + host.checkpoint_bytes
    del kept


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_transformed_when_told(tmp_path, tied):
    host = load(tiny_llama.save(tmp_path / "tiny", tie_word_embeddings=tied))

    def replace(module):
        for name, child in module.named_modules():
            if name == "lm_head":
                module.lm_head = nn.Linear(64, 128, bias=False)
                assert child is not module.lm_head

    kept = host.build(CPU, torch.bfloat16, replace)
    assert kept.lm_head.weight.dtype == torch.bfloat16
    assert (kept.lm_head.weight is kept.model.embed_tokens.weight) is tied
    changed = host.build(CPU, torch.bfloat16, replace, tables=("lm_head",))
    assert changed.lm_head.weight.dtype == torch.float32
    assert changed.model.embed_tokens.weight.dtype == torch.bfloat16


# -- page-locked memory -------------------------------------------------------------------------------------------


class FakeRuntime:
    """cudart, with a limit on what it locks."""

    def __init__(self, limit):
        self.limit, self.locked = limit, {}

    def cudaHostRegister(self, address, size, flags):
        assert address % hostmemory.PAGE == size % hostmemory.PAGE == flags == 0
        if len(self.locked) >= self.limit:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    runtime = FakeRuntime(limit=100)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return runtime


def test_weights_are_page_locked_once_and_released(folder, runtime):
    host = load(folder, pin=True)
    assert host.pinned
    assert len(runtime.locked) == 3
    assert sum(runtime.locked.values()) >= host.checkpoint_bytes
    host.pin(torch.device("cuda", 0))
    assert host.notes == []
    del host
    assert runtime.locked == {}


def test_a_refusal_to_page_lock_is_noted_and_the_model_still_loads(folder, runtime, monkeypatch):
    monkeypatch.setattr(loading, "worker_count", lambda: 1)
    runtime.limit = 1
    host = load(folder, pin=True)
    assert not host.pinned
    assert len(host.notes) == 1
    assert "2 of 3 pieces of host memory are not page-locked" in host.notes[0]
    assert "CUDA error 2" in host.notes[0]
    host.pin(torch.device("cuda", 0))
    assert len(host.notes) == 1
    assert torch.equal(logits(host.build(CPU, torch.bfloat16)), logits(from_pretrained(folder, torch.bfloat16)))


def test_tensors_lie_aligned_in_pages_of_their_own(folder):
    host = load(folder)
    assert len(host.arenas) == 3
    pages = set()
    for arena in host.arenas:
        tensors = arena.tensors.values()
        assert all(tensor.data_ptr() % hostmemory.ALIGNMENT == 0 for tensor in tensors)
        mine = {t.data_ptr() // 4096 for t in tensors} | {(t.data_ptr() + t.nbytes - 1) // 4096 for t in tensors}
        assert not pages & mine
        pages |= mine
