"""The Generator's runner of lowbit's own kernels, with a step that the CPU can take in the kernels' place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_runner import FakeStep, fake_kernels
from tiny import model

from lowbit.errors import LowbitError
from lowbit.generate import Decoder, Generator, make_runner, native
from lowbit.generate.native import NativeRunner
from lowbit.generate.runner import DecoderRunner
from lowbit.sampling import Sampling

PROMPT = list(range(8))


class PickingStep(FakeStep):
    """Takes its pick as the native step does, and counts how often it was recorded."""

    recorded = 0

    def launch(self):
        super().launch()
        if self.pick is not None:
            self.token.copy_(self.pick(self.logits.view(1, 1, -1)))
            self.history[int(self.position)] = self.token.item()

    def capture(self):
        PickingStep.recorded += 1

    __call__ = launch


@pytest.fixture
def generator(monkeypatch):
    fake_kernels(monkeypatch, PickingStep)
    monkeypatch.setattr(PickingStep, "recorded", 0)
    monkeypatch.setattr("lowbit.generate.generator.make_runner", natively)
    return Generator(model(torch.float16), context=64)


def natively(made, batch, length, kv=""):
    return NativeRunner(made, batch, length, kv)


def ids(stream):
    return [token.id for token in stream]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=3), Sampling(1.0, top_k=20, seed=5)])
def test_its_tokens_are_those_of_the_models_own_modules(generator, sampling):
    plain = Generator(generator.model, context=64)
    plain.runner = DecoderRunner(generator.model, 1, 64)
    want = ids(plain(PROMPT, 12, sampling=sampling, stop_at_eos=False))
    for _ in range(2):  # a seed gives the same tokens again
        assert ids(generator(PROMPT, 12, sampling=sampling, stop_at_eos=False)) == want
    assert generator.runner.name == "lowbit's CUDA kernels, one graph per token"
    assert generator.runner.position == len(PROMPT) + 11


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_a_quantized_cache_is_named_and_gives_the_modules_tokens(generator, kv):
    found = Generator(generator.model, context=64, kv=kv)
    plain = Generator(generator.model, context=64)
    plain.runner = DecoderRunner(generator.model, 1, 64, kv)
    assert ids(found(PROMPT, 12, stop_at_eos=False)) == ids(plain(PROMPT, 12, stop_at_eos=False))
    assert found.runner.name == f"lowbit's CUDA kernels, one graph per token, KV cache in {kv}"
    assert plain.runner.name == f"PyTorch modules, KV cache in {kv}"


def test_another_kind_of_sampling_is_recorded_anew(generator):
    greedy = ids(generator(PROMPT, 6, stop_at_eos=False))
    once = PickingStep.recorded
    ids(generator(PROMPT, 6, stop_at_eos=False))
    assert PickingStep.recorded == once
    ids(generator(PROMPT, 6, sampling=Sampling(temperature=1.0), stop_at_eos=False))
    assert PickingStep.recorded == once + 1
    assert ids(generator(PROMPT, 6, stop_at_eos=False)) == greedy


@pytest.mark.parametrize("make", [natively, DecoderRunner])
def test_a_dropped_runner_frees_its_cache_and_its_graphs_at_once(generator, make):
    """And not when Python collects garbage: a longer answer's cache is made after that, and its graphs are recorded."""
    generator.runner = make(generator.model, 1, 16)
    ids(generator(PROMPT, 4, sampling=Sampling(temperature=1.0)))
    ids(generator(PROMPT, 4, stop_at_eos=False))
    decoder = generator.runner._decoder
    held = [weakref.ref(one) for one in (decoder.cache, decoder.native, decoder) if one is not None]
    del decoder
    gc.disable()
    try:
        generator(PROMPT, 24)
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()
    assert generator.runner.length == 64


def test_it_is_offered_for_streamed_models_on_its_device_alone():
    made = model(torch.float16)
    assert native.offer(made, 1, 64) is None
    assert isinstance(make_runner(made, 1, 64), DecoderRunner)


def test_what_is_recorded_needs_a_native_step():
    with pytest.raises(LowbitError, match="call run_natively"):
        Decoder(model(torch.float16), 1, 64).pick_natively(greedily=True)
