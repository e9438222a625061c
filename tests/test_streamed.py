from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import tiny_llama
import torch

from lowbit import device, embedded, models, quality, streamed
from lowbit.errors import LowbitError
from lowbit.loading import load_folder

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def host(request, tmp_path_factory):
    folder = tiny_llama.save(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)
    return load_folder("tiny", folder, models.silent, pin=False)


@pytest.fixture(scope="module")
def text():
    ids = torch.arange(5 * 48) * 7 % 128
    return quality.Text("made", ids, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_streaming_gives_the_bits_of_the_whole_model(host, text, dtype):
    whole = host.build(DEVICE, dtype)
    model = streamed.stream(host, DEVICE, dtype, text.windows())
    for ids in text.windows():
        with torch.no_grad():
            expected = whole.model(input_ids=ids[None], use_cache=False).last_hidden_state
        hidden = model.model(input_ids=ids[None]).last_hidden_state
        assert hidden.dtype == dtype
        assert torch.equal(hidden, expected)
        assert torch.equal(model.lm_head(hidden), whole.lm_head(expected))


def test_a_reference_streamed_is_the_reference(host, text):
    before = host.checksum()
    with (
        quality.Reference.build(
            streamed.stream(host, DEVICE, torch.bfloat16, text.windows()), text
        ) as streamed_reference,
        quality.Reference.build(host.build(DEVICE, torch.bfloat16), text) as reference,
    ):
        assert torch.equal(streamed_reference.nll, reference.nll)
        score = quality.score(host.build(DEVICE, torch.bfloat16), text, streamed_reference)
        assert (score.kld, score.top1, score.ln_ppl_ratio) == (0.0, 1.0, 0.0)
    assert host.checksum() == before


def test_one_layer_at_a_time_is_on_the_device(host, text, monkeypatch):
    moved, told = [], []
    move = torch.nn.Module.to

    def to(module, *args, **kwargs):
        if type(module).__name__ == "LlamaDecoderLayer" and args == (DEVICE,):
            assert [held() for held in moved] == [None] * len(moved), "the layer before is still there"
            moved.append(weakref.ref(module))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    streamed.stream(host, DEVICE, torch.bfloat16, text.windows(), told.append)
    assert told == ["tiny: 1 of 2 layers streamed over 5 windows", "tiny: 2 of 2 layers streamed over 5 windows"]
    assert [held() for held in moved] == [None, None]


def held_bytes(gpu: torch.device) -> int:
    """Bytes of tensors on the GPU. cuBLAS's workspace (32 MiB on an H200), which torch allocates with the first product
    of a stream, is given back first: it is no model's, and 5 times the embedded model's layers."""
    gc.collect()
    torch.cuda.synchronize(gpu)
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_embedded_model_is_streamed_layer_by_layer():
    gpu = torch.device("cuda", 0)
    choice = models.choose("embedded", "auto", device.of(gpu), {})
    host = models.load(choice, pin=True)
    ids = quality.encode_text("held-out", embedded.heldout_text(), host.tokenizer, 512)
    before = held_bytes(gpu)
    model = streamed.stream(host, gpu, torch.bfloat16, ids.windows())
    layers = sum(p.numel() for p in host.master.model.layers.parameters()) * 2
    assert held_bytes(gpu) - before < layers / 2  # the head and the norm
    whole = host.build(gpu, torch.bfloat16)
    with quality.Reference.build(model, ids) as reference:
        score = quality.score(whole, ids, reference)
    assert score.kld == pytest.approx(0.0, abs=1e-9)
    assert score.top1 == 1.0
    assert score.ln_ppl_ratio == pytest.approx(0.0, abs=1e-7)


def test_other_windows_than_the_computed_ones_are_refused(host, text):
    model = streamed.stream(host, DEVICE, torch.bfloat16, text.windows(2))
    other = dataclasses.replace(text, ids=text.ids.flip(0))
    with pytest.raises(LowbitError, match="computed for other windows"):
        model.model(input_ids=other.windows()[:1])
    model = streamed.stream(host, DEVICE, torch.bfloat16, text.windows(1))
    model.model(input_ids=text.windows(1))
    with pytest.raises(LowbitError, match="computed for other windows"):
        model.model(input_ids=text.windows(1))
