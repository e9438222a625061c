"""The model that ships: its shape, that its text and tokenizer come out of the generator again, and what it knows."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lowbit.embedded import WINDOW, corpus, evaluate, heldout_text, load_path, train
from lowbit.embedded.ngram import Trigram

TRIGRAM_STORIES = 3000  # of the 60,000 in training, which take 35 s
FULL_TRIGRAM_GAIN = 0.94  # the trigram of all 60,000 has 0.944 of this one's perplexity (README.md has both)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(load_path(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return evaluate.heldout_ids(load_path())


@pytest.fixture(scope="module")
def ppl(model: LlamaForCausalLM, ids: np.ndarray) -> dict[int, float]:
    scored = evaluate.scored_positions(len(ids))
    tokens = torch.from_numpy(ids)
    return {
        window: evaluate.perplexity(evaluate.token_logprobs(model, tokens, window).numpy(), scored)
        for window in (WINDOW, 64)
    }


def test_config_is_llama_3_1() -> None:
    config = json.loads((load_path() / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 8.0)
    assert rope["original_max_position_embeddings"] == WINDOW < config["max_position_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_act"] == "silu"
    assert config["tie_word_embeddings"] is False
    assert config["head_dim"] in (32, 64)
    for k in ("hidden_size", "intermediate_size"):
        assert config[k] % 256 == 0
    assert config["num_attention_heads"] * config["head_dim"] % 256 == 0
    assert {k: config[k] for k in train.MODEL} == train.MODEL


def test_files_are_bf16_and_at_most_10_mb() -> None:
    assert sum(file.stat().st_size for file in load_path().iterdir() if file.is_file()) <= 10_000_000
    with safe_open(load_path() / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(weights.keys())


LOAD = """
import logging, sys, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
warnings.simplefilter("error")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(model.dtype, tokenizer.is_fast, said)
"""


def test_loads_without_a_warning() -> None:
    # a fresh process: transformers says some things only once; its own imports may warn, this folder may not
    ran = subprocess.run([sys.executable, "-c", LOAD, load_path()], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["torch.bfloat16", "True", "[]"], ran.stderr


def test_heldout_text_is_the_generators_byte_for_byte() -> None:
    shipped = (load_path() / "heldout.txt").read_bytes()
    assert shipped == corpus.write_heldout().encode()
    assert heldout_text().encode() == shipped


def test_tokenizer_is_trained_again_byte_for_byte(tmp_path: Path) -> None:
    train.write_tokenizer(train.train_tokenizer(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (load_path() / name).read_bytes(), name


def test_tokenizer_begins_with_bos_and_gives_the_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(load_path())
    encoded = tokenizer(heldout_text())["input_ids"]
    assert encoded[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(encoded, skip_special_tokens=True) == heldout_text()
    assert len(encoded) >= 16 * WINDOW + 1
    assert tokenizer.decode(tokenizer("naïve 東京 🙂")["input_ids"], skip_special_tokens=True) == "naïve 東京 🙂"


def test_a_story_depends_on_its_number_alone() -> None:
    assert list(corpus.tell_stories(7, 3, start=2)) == list(corpus.tell_stories(7, 6))[2:5]
    assert next(corpus.tell_stories(7, 1)) != next(corpus.tell_stories(8, 1))


def test_heldout_stories_are_not_in_training() -> None:
    training = set(corpus.tell_stories(corpus.TRAINING_SEED, 2000))
    assert not training & set(corpus.tell_stories(corpus.HELDOUT_SEED, corpus.HELDOUT_STORIES))


def test_long_window_is_at_least_3_percent_better(ppl: dict[int, float]) -> None:
    assert ppl[WINDOW] <= 0.97 * ppl[64]


def test_perplexity_is_at_most_half_of_a_trigrams(ppl: dict[int, float]) -> None:
    trigram, _ = evaluate.score_trigram(load_path(), TRIGRAM_STORIES)
    assert trigram > 3, "a trigram this good has seen the held-out text"
    assert ppl[WINDOW] <= trigram * FULL_TRIGRAM_GAIN / 2


def test_fewer_bits_have_more_kl(model: LlamaForCausalLM, ids: np.ndarray) -> None:
    windows = torch.from_numpy(ids[: 4 * WINDOW]).view(4, WINDOW)
    kl = [evaluate.mean_kl(model, evaluate.rounded_copy(model, bits), windows) for bits in (8, 4, 3, 2, 1)]
    assert kl == sorted(kl)
    assert all(more > 1.5 * less > 0 for less, more in itertools.pairwise(kl)), kl


def test_greedy_decoding_is_english_like(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(load_path())
    prompt = tokenizer("In Ashberg there lived", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=120, do_sample=False)[0], skip_special_tokens=True)
    known = set("".join(c if c.isalpha() else " " for c in heldout_text()).split())
    words = "".join(c if c.isalpha() else " " for c in text).split()
    assert len(words) > 60
    assert sum(word in known for word in words) > 0.85 * len(words), text


def test_round_to_nearest_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0, -0.4, 0.4, 1.0]])
    assert evaluate.round_to_nearest(weight, 2, group=4)[0, :4].tolist() == [0, 1, 2, 3]
    assert evaluate.round_to_nearest(weight, 1, group=4)[0].tolist() == [0, 0, 3, 3, -1, -1, 1, 1]


def test_token_logprobs_are_transformers_own_loss(model: LlamaForCausalLM, ids: np.ndarray) -> None:
    exact = AutoModelForCausalLM.from_pretrained(load_path(), dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids[:WINDOW])
    with torch.no_grad():
        loss = float(exact(tokens[None], labels=tokens[None]).loss)
    assert -float(evaluate.token_logprobs(exact, tokens, WINDOW)[1:].mean()) == pytest.approx(loss, rel=1e-5)


def test_trigram_probabilities_sum_to_one() -> None:
    vocab = 7
    trigram = Trigram(np.random.default_rng(0).integers(0, vocab - 1, 300), vocab)  # token 6 is never seen
    trigram.tune(np.random.default_rng(1).integers(0, vocab, 100))
    for context in ((0, 1), (6, 2), (3, 6), (6, 6)):
        p = [float(trigram.probabilities(np.array([*context, w]))[0]) for w in range(vocab)]
        assert min(p) > 0
        assert sum(p) == pytest.approx(1)


def test_trigram_by_hand() -> None:
    trigram = Trigram(np.array([0, 1, 2, 0, 1, 3]), 4)  # 01→2, 01→3, 12→0, 20→1
    trigram.discounts = [np.array([0.0, 0, 0]), np.array([0.5, 1, 1.5]), np.array([0.5, 1, 1.5])]
    # left contexts per token: 0: {2}, 1: {0}, 2: {1}, 3: {1} → unigram 1/4 each; after 1: 2 and 3 once each
    bigram = (1 - 0.5 + 2 * 0.5 * 0.25) / 2
    assert trigram.probabilities(np.array([0, 1, 2]))[0] == pytest.approx((1 - 0.5 + 2 * 0.5 * bigram) / 2)


def test_training_runs_on_the_cpu_and_its_start_is_reproducible() -> None:
    first, second = train.make_model(), train.make_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    text = corpus.join_stories(corpus.tell_stories(corpus.TRAINING_SEED, 6))
    ids = np.array([0, *AutoTokenizer.from_pretrained(load_path()).encode(text)], dtype=np.uint16)
    before = first.lm_head.weight.detach().clone()
    draws = [train.Batches(ids, 1, torch.device("cpu")).draw()[0] for _ in range(2)]
    assert torch.equal(*draws)
    train.train_model(first, train.Batches(ids, 1, torch.device("cpu")), steps=2, rate=1e-3)
    assert not torch.equal(before, first.lm_head.weight)
