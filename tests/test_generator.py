"""Generator: streams what the model says, in every kind of sampling, behind any runner; refuses what can't be done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from lowbit import device, embedded
from lowbit.backends import coverage
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.generate import Generator, Token, make_runner, register_runner
from lowbit.generate.detokenizer import Detokenizer
from lowbit.generate.runner import DecoderRunner, unregister_runner
from lowbit.kernels.modules import packed_modules
from lowbit.quiet import quiet_import
from lowbit.sampling import GREEDY, Sampling

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def story():
    return Generator.from_model("embedded", format="a16w4_g128", device="cpu")


@pytest.fixture(scope="module")
def small():
    """Token ids only, no end-of-text token but 7."""
    made = tiny.model()
    made.config.eos_token_id = made.generation_config.eos_token_id = 7
    return Generator.from_model(made, format="a16w8")


def ids(tokens):
    return [token.id for token in tokens]


class FakeRunner:
    """Counts upwards from the prompt's last token."""

    name = "counting"

    def __init__(self, model, batch, length):
        self.length, self.position, self.token, self.resets = length, 0, None, []

    def reset(self, sampling):
        self.resets.append(sampling)

    def prefill(self, prompt):
        self.position = prompt.shape[1]
        self.token = prompt[:, -1:] + 1
        return self.token

    def step(self):
        self.position += 1
        self.token.add_(1)  # valid until the next call, no longer
        return self.token


KV_RECIPE = "a16w4_g128_lowbit_kv_fp8-recipe"


def counted(model, batch, length, kv):
    return FakeRunner(model, batch, length)


@pytest.fixture
def counting(small):
    register_runner("counting", counted)
    generator = Generator(small.model)
    yield generator
    unregister_runner("counting")


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [None, "a16w4_g128", "a16w8-torchao"])
def test_greedy_tokens_are_transformers_own(fmt):
    """In fp32: in bf16 a static and a growing cache part where two tokens are as likely as each other."""
    transformers, folder = quiet_import("transformers"), embedded.load_path()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    generator = Generator.from_model(model, format=fmt, tokenizer=tokenizer)
    prompt = torch.tensor([generator.tokenizer(PROMPT)["input_ids"]])
    want = generator.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=-1
    )
    got = list(generator(PROMPT, max_new_tokens=24, stop_at_eos=False))
    assert ids(got) == want[0, prompt.shape[1] :].tolist()
    assert generator.runner.name == "PyTorch modules"


def test_the_pieces_are_the_text_of_all(story):
    tokens = list(story(PROMPT, max_new_tokens=40))
    assert "".join(token.text for token in tokens) == story.tokenizer.decode(ids(tokens), skip_special_tokens=True)
    assert [token.finish for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert len(tokens) == 40 or tokens[-1].finish == "eos"


def test_text_ids_and_tensors_are_the_same_prompt(story):
    prompt = story.tokenizer(PROMPT)["input_ids"]
    want = ids(story(PROMPT, 8))
    assert ids(story(prompt, 8)) == want
    assert ids(story(torch.tensor(prompt), 8)) == want
    assert ids(story(torch.tensor([prompt]), max_new_tokens=8)) == want


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=1), Sampling(1.2, top_k=20, seed=1), Sampling(1.0, top_p=0.9, seed=1)], ids=str
)
def test_a_seed_gives_the_same_text_again(story, sampling):
    def run(settings):
        return ids(story(PROMPT, 16, sampling=settings, stop_at_eos=False))

    first = run(sampling)
    greedy = run(GREEDY)
    assert run(sampling) == first
    assert first != greedy
    assert run(Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=2)) != first
    assert run(GREEDY) == greedy


def test_tokens_come_as_they_are_made(counting):
    stream = counting([1, 2, 3], max_new_tokens=100)
    assert next(stream).id == 4
    assert counting.runner.position == 4  # one step ahead of what is read
    assert next(stream).id == 5
    assert counting.runner.position == 5


def test_a_token_may_be_overwritten_by_the_next_step(counting):
    assert ids(counting([1, 2, 10], max_new_tokens=5)) == [11, 12, 13, 14, 15]


def test_end_of_text_stops_when_asked(counting):
    assert list(counting([4], max_new_tokens=9)) == [Token(5, ""), Token(6, ""), Token(7, "", "eos")]
    without = list(counting([4], max_new_tokens=9, stop_at_eos=False))
    assert ids(without) == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert without[-1].finish == "length"
    assert list(counting([6], max_new_tokens=1)) == [Token(7, "", "eos")]


def test_several_tokens_may_end_a_text(small):
    small.model.generation_config.eos_token_id = [7, 9]
    assert small.eos == {7, 9}
    small.model.generation_config.eos_token_id = None
    assert small.eos == {7}
    small.model.config.eos_token_id = None
    assert small.eos == frozenset()
    small.model.config.eos_token_id = small.model.generation_config.eos_token_id = 7


# -- runners -----------------------------------------------------------------------------------------------------------


def test_a_registered_runner_is_taken_and_may_decline(small):
    assert isinstance(make_runner(small.model, 1, 32), DecoderRunner)
    asked = []

    def factory(model, batch, length, kv):
        asked.append((batch, length, kv))
        return FakeRunner(model, batch, length) if length > 64 else None

    register_runner("large", factory)
    try:
        assert make_runner(small.model, 1, 65, "int8").name == "counting"
        assert isinstance(make_runner(small.model, 1, 64), DecoderRunner)
    finally:
        unregister_runner("large")
    assert asked == [(1, 65, "int8"), (1, 64, "")]


@pytest.mark.parametrize(
    ("format", "kv", "held"), [(KV_RECIPE, None, "fp8"), (None, "int4", "int4"), (KV_RECIPE, "", "")]
)
def test_the_cache_is_the_formats_or_the_one_that_is_asked_for(format, kv, held):
    generator = Generator.from_model(tiny.model(), format, kv=kv, context=40)
    assert len(list(generator([1, 2, 3], 4, stop_at_eos=False))) == 4
    assert generator.runner.name == ("PyTorch modules" + f", KV cache in {held}" * bool(held))


@pytest.mark.parametrize("kv", ["int5", "fp8_attn"])
def test_a_cache_that_it_can_not_hold_is_refused_by_name(small, kv):
    with pytest.raises(LowbitError, match=rf"unknown KV cache format of a Generator '{kv}'; known: fp8, int4, int8"):
        Generator(small.model, kv=kv)


def test_a_runner_is_kept_while_it_is_long_enough(counting):
    list(counting([1], 8, sampling=Sampling(0.5, seed=3)))
    first = counting.runner
    assert first.length == 256
    list(counting([1], 255))
    assert counting.runner is first
    assert first.resets == [Sampling(0.5, seed=3), GREEDY]
    list(counting([1], 256))
    assert counting.runner is not first
    assert counting.runner.length == 512  # the model's limit


def test_a_context_is_made_once(small):
    register_runner("counting", counted)
    try:
        generator = Generator(small.model, context=40)
        list(generator([1, 2], 4))
        assert generator.runner.length == 40
        with pytest.raises(LowbitError, match="prompt and answer take 41 tokens, the context allows 40"):
            generator([1, 2], 39)
    finally:
        unregister_runner("counting")


def test_the_plain_runner_fills_its_cache_to_the_end(small):
    runner = make_runner(small.model, 2, 16)
    runner.reset(GREEDY)
    assert runner.prefill(torch.ones(2, 10, dtype=torch.int64)).shape == (2, 1)
    for _ in range(6):
        runner.step()
    assert runner.position == 16
    with pytest.raises(LowbitError, match="the KV cache holds 16 tokens: 16 used, 1 more asked"):
        runner.step()
    runner.reset(Sampling(1.0))
    runner.prefill(torch.ones(2, 3, dtype=torch.int64))
    assert runner.position == 3


# -- building ----------------------------------------------------------------------------------------------------------


def test_a_given_model_stays_as_it_is():
    made = tiny.model()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    generator = Generator.from_model(made, format="a16w4_g128", device="cpu")
    assert coverage.inspect(generator.model, FORMATS["a16w4_g128-lowbit"]).linears == 15
    after = made.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert generator.model.model.norm.weight.data_ptr() == made.model.norm.weight.data_ptr()


@pytest.mark.parametrize("fmt", [row.name for row in FORMATS.values() if row.backend == "lowbit"])
def test_every_format_of_ours_generates_the_same_before_and_after_a_file(fmt, tmp_path):
    generator = Generator.from_model(tiny.model(tie_word_embeddings=fmt == "a16w8"), format=fmt)
    generator.model.model.rotary_emb = type(generator.model.model.rotary_emb)(generator.model.config)  # fp32, as saved
    want = ids(generator([3, 5, 8], 12, stop_at_eos=False))
    generator.save(tmp_path / "packed.safetensors")
    again = Generator.from_packed(tmp_path / "packed.safetensors")
    assert ids(again([3, 5, 8], 12, stop_at_eos=False)) == want


def test_a_model_by_name_is_quantized_throughout(story):
    packed = packed_modules(story.model)
    assert len(packed) == 7 * story.model.config.num_hidden_layers + 1
    assert {module.format for module in packed.values()} == {"int4_g128"}


def test_the_documented_example_runs_and_says_what_it_is_said_to(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "generating.md").read_text()
    code, said = re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowbit.device.detect", lambda: device.of(torch.device("cpu")))
    exec(compile(code, "generating.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.split()[:6] == said.split()[:6]  # further on, another processor's rounding may choose another word
    assert Generator.from_packed(tmp_path / "packed.safetensors").model.config.num_hidden_layers == 4


def test_a_folder_is_a_model_too():
    generator = Generator.from_model(embedded.load_path(), format=None, device="cpu", context=64)
    assert generator.model.model.norm.weight.dtype == torch.bfloat16
    assert len(list(generator(PROMPT, 4, stop_at_eos=False))) == 4
    with pytest.raises(LowbitError, match="expected a model with lowbit's packed weights"):
        generator.save("never.safetensors")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "the prompt: expected one token id or more of 0 to 511, got none"),
        ([512], 4, "of 0 to 511, got 512 to 512"),
        ([-1, 3], 4, "got -1 to 3"),
        ([1], 0, "max_new_tokens: expected 1 or more, got 0"),
        ([1] * 500, 13, r"take 513 tokens, the model's max_position_embeddings allows 512"),
        ("words", 4, "a prompt in words needs a tokenizer"),
    ],
)
def test_refused_at_once(small, prompt, count, message):
    with pytest.raises(LowbitError, match=message):
        small(prompt, count)


def test_a_stream_ends_where_the_next_one_begins(counting):
    stream = counting([1], 8)
    next(stream)
    assert ids(counting([20], 2)) == [21, 22]
    with pytest.raises(LowbitError, match="this generator was called again"):
        next(stream)


def test_a_format_that_can_not_run_says_why():
    with pytest.raises(LowbitError, match="a16w4_g128-lowbit can't run here: shape: group 128 does not divide q_proj"):
        Generator.from_model(tiny.model(hidden_size=192, head_dim=24))
    with pytest.raises(LowbitError, match="a16w8-gemlite can't run here: capability: needs cuda, this is cpu"):
        Generator.from_model("embedded", format="a16w8-gemlite", device="cpu")
    with pytest.raises(LowbitError, match=r"unknown format 'a16w5-lowbit'; of .* the nearest: .*a16w8-lowbit"):
        Generator.from_model(tiny.model(), format="a16w5")
    with pytest.raises(LowbitError, match="context: expected 1 to 512 tokens"):
        Generator(tiny.model(), context=513)


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = quiet_import("transformers").PreTrainedTokenizerFast.from_pretrained(embedded.load_path())
    text = "Lily saw a ☃ and a 🐉, naïve."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text
    assert "" in pieces  # the snowman's first bytes
    assert any("☃" in piece for piece in pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_what_is_cut_off_in_a_character_is_shown_at_the_end():
    tokenizer = quiet_import("transformers").PreTrainedTokenizerFast.from_pretrained(embedded.load_path())
    tokens = tokenizer("a ☃", add_special_tokens=False)["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(tokens)


def test_special_tokens_have_no_text():
    tokenizer = quiet_import("transformers").PreTrainedTokenizerFast.from_pretrained(embedded.load_path())
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add(0), detokenizer.add(1), detokenizer.finish()] == ["", "", ""]
