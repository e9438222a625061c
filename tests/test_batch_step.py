"""The native step of 2 to 8 sequences, as far as it can be checked without its GPU: what it needs, what it launches."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch
from test_runner import FakeStep, Recorder, fake_kernels, streamed
from tiny import config, gpu, model

from lowbit import generate, native_step, step_command
from lowbit.backends import native
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.generate.native import NativeRunner
from lowbit.kernels import batch, geometry, runner
from lowbit.kernels.batch_step import BatchStep
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.stream import LAYOUTS
from lowbit.sampling import Sampling

H200 = (9, 0)
LLAMAS = {
    "8b": (4096, 14336, 32, 8, 128),
    "1b": (2048, 8192, 32, 8, 64),
    "3b": (3072, 8192, 24, 8, 128),
    "small": (256, 768, 8, 2, 32),
}


@pytest.fixture
def module(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(runner, "load", lambda shape, device, progress=None: found)
    return found


def step_of(made, dtype, count):
    decoder = generate.Decoder(made, count, 160, dtype)
    return BatchStep(made, decoder.cache, decoder.token, decoder.position), decoder


# -- what it needs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("widths", LLAMAS.values(), ids=LLAMAS)
def test_a_block_has_shared_memory_for_x_a_ring_and_the_sums_of_its_tiles(name, widths):
    hidden, inter, heads, kv, dim = widths
    for count in (2, 5, 8):
        shape = Geometry(name, *widths, eps=1e-5, batch=count)
        for product, k, rows in (
            ("qkv", hidden, (heads + 2 * kv) * dim),
            ("o", heads * dim, hidden),
            ("gate_up", hidden, 2 * inter),
            ("down", inter, hidden),
            ("head", hidden, 128256),
        ):
            plan = batch.plan(shape, product, k, rows // 16)
            assert plan.ring % shape.warps == 0
            assert shape.warps <= plan.ring <= geometry.MAX_RING
            assert plan.shared_bytes <= geometry.RING_BYTES
            assert plan.blocks <= geometry.BLOCKS
            assert plan.blocks % plan.slices == 0
            assert (plan.slices > 1) <= (product in batch.SLICED)
            tiles = -(-(rows // 16) // (plan.blocks // plan.slices))
            stages = k // LAYOUTS[name].widest // plan.slices  # of a tile, at least
            assert plan.turns == tiles or (plan.turns - 1) * max(stages, 1) >= plan.ring + shape.warps - 1
            assert plan.turns <= shape.warps * 32  # a thread each to count them


def test_what_several_sequences_need_is_said():
    assert batch.unmet(config(), "int4_g128", H200, 8, "fp8") is None
    assert batch.unmet(config(), "int4_g128", (8, 0), 8)[0] == "capability"
    assert batch.unmet(config(), "int4_g128", H200, 9) == (
        "shape",
        "the native step decodes 1 to 8 sequences, this case has 9",
    )
    kind, reason = batch.unmet(config(intermediate_size=256 * 11 * 16), "int2_g128", H200, 8)
    assert kind == "shape"
    assert "8 sequences of K=45056" in reason
    assert batch.unmet(config(intermediate_size=256 * 11 * 16), "int2_g128", H200) is None


def test_a_format_without_a_stream_is_refused_for_several_sequences_as_for_one(monkeypatch):
    monkeypatch.setattr(geometry, "LAYOUTS", {"int8": LAYOUTS["int8"]})
    reason = "capability", "no decode kernel streams int4_g128; there are ones for int8"
    assert batch.unmet(config(), "int4_g128", H200) == reason
    assert batch.unmet(config(), "int4_g128", H200, 2) == reason


@pytest.mark.usefixtures("with_nvrtc")
@pytest.mark.parametrize("count", [2, 8])
def test_the_benches_of_several_sequences_run_natively(count):
    row = FORMATS["a16w4_g128-lowbit"]
    assert native.step_unmet(row, gpu(9, 0), config(), count) is None
    assert "1 to 8 sequences" in str(native.step_unmet(row, gpu(9, 0), config(), 16))


def test_a_batch_that_it_was_not_made_for_is_refused(module):
    made, dtype = streamed()
    for count in (1, 9):
        with pytest.raises(
            LowbitError, match=f"decodes 2 to 8 sequences, got {count} tokens and a cache of {count} sequences"
        ):
            step_of(made, dtype, count)
    decoder = generate.Decoder(made, 3, 160, dtype)
    with pytest.raises(LowbitError, match="got 2 tokens and a cache of 3 sequences"):
        BatchStep(made, decoder.cache, torch.zeros(2, 1, dtype=torch.int64), decoder.position)


# -- what it launches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4_g128", "bf16"])
def test_a_step_is_7_kernels_per_layer_in_order_with_the_models_own_memory(module, name):
    made, dtype = streamed(name)
    step, decoder = step_of(made, dtype, 3)
    step.launch()
    parts, of = batch.PRODUCTS, batch.NORMALIZE.format
    slices = {k: batch.slices(name, k) for k in (256, 768)}
    layer = [parts["qkv"], "attention_kernel<1, 8>", parts["o"], of(slices[256]), parts["gate_up"], parts["down"]]
    want = ["embed_kernel", of(0), *layer, of(slices[768]), *layer, of(slices[768]), parts["head"]]
    assert [kernel for kernel, *_ in module.launched] == want
    assert [overlap for *_, overlap in module.launched] == [False] + [True] * (len(want) - 1)
    embed, norm, qkv, attention, o, then, gate_up, down, _ = (one[3] for one in module.launched[:9])
    body = made.model
    assert module.launched[0][1] == (1, 3)
    assert module.launched[1][1] == (3, 1)
    assert module.launched[3][1] == (3 * 2, step.shape.splits)
    assert norm.norm == body.layers[0].input_layernorm.weight.data_ptr()
    assert then.norm == body.layers[0].post_attention_layernorm.weight.data_ptr()
    assert norm.residual == embed.x == then.residual == step.residual.data_ptr()
    assert norm.x == qkv.x == gate_up.x == step.x.data_ptr()
    assert o.out == down.out == then.parts == step.parts.data_ptr()
    assert attention.keys == decoder.cache.layers[0].keys.data_ptr()
    assert gate_up.weights == body.layers[0].mlp.up_proj.part.stream.data.data_ptr()
    head = module.launched[-1][3]
    assert (head.token, head.position) == (decoder.token.data_ptr(), decoder.position.data_ptr())
    assert (head.out, head.length) == (step.logits.data_ptr(), 161)
    assert (step.logits.shape, step.history.shape) == ((3, 512), (3, 161))
    assert (qkv.token, qkv.history) == (None, None)


# -- the decoder that runs it ------------------------------------------------------------------------------------------


class FakeBatchStep(FakeStep):
    """A step of several sequences that does what the eager one does, its second sequence ``wrong`` by a factor."""

    def __init__(self, made, cache, token, position, progress=None, pick=None):
        super().__init__(made, cache, token, position, progress, pick)
        self.history = self.history.repeat(len(token), 1)

    def launch(self):
        found = generate.decode_logits(self.model, self.token, self.position, self.cache)
        self.logits = found[:, 0].float()
        self.logits[1] *= self.wrong
        self.token.copy_((self.pick or generate.decoder.greedy)(found))
        self.position += 1
        self.history[:, int(self.position)] = self.token[:, 0]

    __call__ = launch


@pytest.fixture
def decoding(monkeypatch):
    fake_kernels(monkeypatch)
    monkeypatch.setattr("lowbit.generate.decoder.BatchStep", FakeBatchStep)
    return model(torch.float16)


def test_a_runner_of_several_sequences_draws_as_the_modules_do(decoding):
    ids = torch.arange(24).view(3, 8)
    for sampling in (Sampling(), Sampling(temperature=0.9, seed=3)):
        found = []
        for made in (NativeRunner(decoding, 3, 64), generate.runner.DecoderRunner(decoding, 3, 64)):
            made.reset(sampling)
            tokens = [made.prefill(ids).clone(), *(made.step().clone() for _ in range(6))]
            found.append(torch.cat(tokens, 1))
            assert made.position == 14
        assert found[0].shape == (3, 7)
        assert torch.equal(*found)


def test_one_wrong_sequence_of_several_is_an_error(decoding, monkeypatch):
    monkeypatch.setattr(FakeBatchStep, "wrong", 1.05)
    decoder = generate.Decoder(decoding, 8, 64, torch.float16)
    with pytest.raises(LowbitError, match=r"a case: the native step's logits .* differ by 5.00e-02"):
        decoder.run_natively(torch.arange(64).view(8, 8), "a case")


def test_the_step_command_counts_the_tokens_of_all_sequences(decoding, monkeypatch):
    monkeypatch.setattr(native_step, "rate", lambda step, context, count, where: 100.0)
    monkeypatch.setattr(native_step, "attention_us", lambda step, context: 2.0)
    monkeypatch.setattr(native_step, "operations", lambda step, made: {"head": (1, 3.0, 4.0)})
    lines = list(native_step._measure(decoding, "int8", "", 1.0, [16], [8], 2, 4))
    assert all(line["batch"] == 4 for line in lines)
    decode, repeats = lines[1], lines[2]
    assert (decode["what"], decode["tok_s"]) == ("decode", 400.0)
    assert (repeats["what"], repeats["differ"]) == ("repeats", 0)


def test_the_step_command_takes_several_batches_and_refuses_what_no_step_runs(monkeypatch):
    found = {"--batch": "8,9", "--model": "embedded", "--load-format": "auto", "--formats": "int4_g128"}
    parser = argparse.ArgumentParser()
    step_command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["step", *itertools.chain(*found.items())])
    monkeypatch.setattr("lowbit.kernels.batch.geometry.unmet", only_by_count)
    with pytest.raises(LowbitError, match="step: int4_g128 can't run here: 9 sequences"):
        native_step.main(options)
    options.batch = "0"
    with pytest.raises(LowbitError, match="--batch: expected whole numbers of 1 or more"):
        native_step.main(options)


def only_by_count(shape, name, capability, count=1, kv=""):
    return ("shape", f"{count} sequences") if count > 8 else None
