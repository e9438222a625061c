from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit import embedded, quality
from lowbit.errors import LowbitError
from lowbit.quality import Reference, Text, divergence, encode_text, join_wikitext, load_text, score

WINDOW, VOCAB = 24, 96
STORIES = [path for up in Path(__file__).parents[1:4] if (path := up / "shared" / "data" / "stories260K").is_dir()]
"""A trained checkpoint of 0.26 million parameters, in the folder ``shared`` of or beside the checkout."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.15,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def worse(model: Any) -> Any:
    """The same model with noise on its weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name, weight in other.named_parameters():
        if "proj" in name:
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def text() -> Text:
    """20 windows and a partial one."""
    ids = torch.randint(VOCAB, (20 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))
    return Text("noise", ids, WINDOW)


def plain_perplexity(model: Any, text: Text) -> float:
    """The loop anybody would write: transformers' own loss of each window."""
    losses = [model(ids[None], labels=ids[None]).loss.item() for ids in text.windows()]
    return math.exp(sum(losses) / len(losses))


def plain_log_probs(model: Any, text: Text, windows: int) -> Tensor:
    """[windows, WINDOW - 1, V] in float64."""
    logits = torch.stack([model(ids[None]).logits[0] for ids in text.windows(windows)])
    return F.log_softmax(logits.double(), dim=-1)[:, :-1]


def test_perplexity_is_that_of_a_plain_loop_over_transformers_loss(model: Any, text: Text) -> None:
    result = score(model, text)
    assert result.ppl == pytest.approx(plain_perplexity(model, text), rel=1e-6)
    assert (result.protocol, result.tokens) == ("noise_24", 20 * (WINDOW - 1))
    assert (result.kld, result.top1, result.ln_ppl_ratio, result.kld_tokens) == (None, None, None, 0)


@pytest.mark.skipif(not STORIES, reason="there is no shared/data/stories260K in or beside this checkout")
def test_a_trained_checkpoints_perplexity_on_a_text_file_too() -> None:
    trained = LlamaForCausalLM.from_pretrained(STORIES[0], dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(STORIES[0])
    heldout = load_text(Path(embedded.__file__).with_name("heldout.txt"), tokenizer, 256)
    text = Text(heldout.name, heldout.ids[: 24 * 256 + 100], 256)
    result = score(trained, text)
    assert result.tokens == 24 * 255
    assert 2 < result.ppl < 512  # trained, and on stories
    assert result.ppl == pytest.approx(plain_perplexity(trained, text), rel=1e-4)


def test_perplexity_in_bf16_too(model: Any, text: Text) -> None:
    half = copy.deepcopy(model).bfloat16()
    assert score(half, text).ppl == pytest.approx(plain_perplexity(half, text), rel=1e-4)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCAB * 5, 4 * VOCAB * WINDOW])
def test_the_chunk_of_positions_changes_nothing(
    model: Any, worse: Any, text: Text, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reference.build(model, text) as reference:
        whole = score(worse, text, reference)
    monkeypatch.setattr(quality, "CHUNK_BYTES", chunk_bytes)
    with Reference.build(model, text) as reference:
        chunked = score(worse, text, reference)
    assert chunked.ppl == pytest.approx(whole.ppl, rel=1e-6)
    assert chunked.kld == pytest.approx(whole.kld, rel=1e-4)
    assert chunked.kld_tokens == whole.kld_tokens


@pytest.mark.parametrize("windows", [3, 16, 50])
def test_kl_top1_and_ratio_against_plain_formulas(model: Any, worse: Any, text: Text, windows: int) -> None:
    with Reference.build(model, text, windows=windows) as reference:
        result = score(worse, text, reference)
    compared = min(windows, 20)
    p, q = plain_log_probs(model, text, compared), plain_log_probs(worse, text, compared)
    assert result.kld == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.kld_tokens == compared * (WINDOW - 1)
    expected = math.log(plain_perplexity(worse, text) / plain_perplexity(model, text))
    assert result.ln_ppl_ratio == pytest.approx(expected, abs=1e-6)
    assert 0.001 < result.kld < 1
    assert 0.1 < result.top1 < 0.999


def test_stderr_of_the_ratio_is_that_of_the_window_means(model: Any, worse: Any, text: Text) -> None:
    means = []
    for ids in text.windows():
        loss = [m(ids[None], labels=ids[None]).loss.double().item() for m in (worse, model)]
        means.append(loss[0] - loss[1])
    with Reference.build(model, text, windows=1) as reference:
        result = score(worse, text, reference)
        single = score(worse, text, reference, max_windows=1)
    spread = torch.tensor(means).std().item()
    assert result.ln_ppl_ratio_stderr == pytest.approx(spread / math.sqrt(20), rel=1e-3)
    assert single.ln_ppl_ratio_stderr is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host_bytes", [None, 0])
def test_a_model_against_itself(model: Any, text: Text, dtype: torch.dtype, host_bytes: int | None) -> None:
    same = copy.deepcopy(model).to(dtype)
    with Reference.build(same, text, host_bytes=host_bytes) as reference:
        assert reference.logits.on_disk == (host_bytes == 0)
        result = score(same, text, reference)
    assert (result.kld, result.top1, result.ln_ppl_ratio, result.ln_ppl_ratio_stderr) == (0, 1, 0, 0)


def test_divergence_of_hand_made_distributions() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3]]).log() + 7
    other = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]).log() - 3
    # 0.5 ln 2 - 0.25 ln 2; equal; -(ln 3 + mean of the logs)
    expected = [0.25 * math.log(2), 0.0, -math.log(3) - (math.log(0.6) + math.log(0.3) + math.log(0.1)) / 3]
    assert divergence(base, other).tolist() == pytest.approx(expected, abs=1e-6)
    assert divergence(other, base)[2].item() != pytest.approx(expected[2], rel=0.01)  # the direction matters


def test_divergence_of_near_equals_is_not_lost_in_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(200, 4096, generator=generator)
    other = base + 0.003 * torch.randn(200, 4096, generator=generator)
    p, q = F.log_softmax(base.double(), -1), F.log_softmax(other.double(), -1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert 1e-6 < expected < 1e-5
    assert divergence(base, other).mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_has_the_bits_of_torchs_own(dtype: torch.dtype) -> None:
    base, other = torch.randn(2, 7, 1000, generator=torch.Generator().manual_seed(3)).mul(8).to(dtype).float()
    p, q = F.log_softmax(base, dim=-1), F.log_softmax(other, dim=-1)
    assert torch.equal(divergence(base, other), F.kl_div(q, p, log_target=True, reduction="none").sum(-1))


@torch.no_grad()
def test_scoring_takes_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a case fits its card is asked of ``scored_bytes`` before: KL took 7.3 blocks, it takes 4.4."""
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = LlamaConfig(hidden_size=16, vocab_size=16384, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()
    text = Text("noise", torch.randint(16384, (2 * WINDOW,), generator=torch.Generator().manual_seed(1)), WINDOW)
    monkeypatch.setattr(quality, "CHUNK_BYTES", 4 * 4 * 16384)  # 4 positions of 24
    with Reference.build(model, text) as reference, LiveBytes() as made:
        score(model, text, reference)
    block, said = quality.CHUNK_BYTES, quality.scored_bytes(16384, WINDOW)
    assert said == 5 * block
    assert 4 * block < made.peak < 4.6 * block
    with LiveBytes() as made:
        Reference.build(model, text, windows=0).close()
    assert made.peak < 3.4 * block
    assert quality.scored_bytes(VOCAB, WINDOW) == 5 * 4 * VOCAB * WINDOW  # a window is no full block


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(model: Any, text: Text, poison: float) -> None:
    text = Text("without 7", text.ids.masked_fill(text.ids == 7, 8), WINDOW)  # so -inf there touches no target
    broken = copy.deepcopy(model)
    broken.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor(7), poison)
    )
    with pytest.raises(LowbitError, match="NaN/Inf logits from a8w8-torchao"):
        score(broken, text, source="a8w8-torchao")
    with pytest.raises(LowbitError, match="NaN/Inf logits from bf16-torch"):
        Reference.build(broken, text, source="bf16-torch")


def test_another_text_or_window_is_refused(model: Any, text: Text) -> None:
    with Reference.build(model, text, max_windows=4) as reference:
        for other in (Text("noise", text.ids, 12), Text("noise", text.ids.flip(0), WINDOW), text):
            with pytest.raises(LowbitError, match="build a reference on the same text"):
                score(model, other, reference)
        assert score(model, text, reference, max_windows=4).tokens == 4 * (WINDOW - 1)


def test_the_reference_file_has_no_name_even_while_open(model: Any, text: Text, tmp_path: Path) -> None:
    with Reference.build(model, text, directory=tmp_path, host_bytes=0) as reference:
        assert reference.logits.on_disk
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_windows_drop_the_last_partial_one() -> None:
    text = Text("count", torch.arange(11), 3)
    assert text.windows().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert text.windows(2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert text.protocol == "count_3"


@pytest.mark.parametrize(
    ("count", "window", "message"), [(5, 6, "too short: one window is 6 tokens, got 5"), (5, 1, "at least 2")]
)
def test_a_text_of_no_window_is_refused(count: int, window: int, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Text("short", torch.arange(count), window)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {"<s>": 0, "?": 1, "a": 2, "b": 3, "c": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?", model_max_length=4)


def test_one_bos_stands_at_the_front(tokenizer: Any, tmp_path: Path) -> None:
    assert encode_text("t", "a b c a b c", tokenizer, 3).ids.tolist() == [0, 2, 3, 4, 2, 3, 4]
    path = tmp_path / "my text.txt"
    path.write_text("a b\nc", encoding="utf-8")
    text = load_text(path, tokenizer, 2)
    assert (text.protocol, text.ids.tolist()) == ("my_text_2", [0, 2, 3, 4])


def test_wikitext2_is_joined_by_blank_lines(tokenizer: Any, tmp_path: Path) -> None:
    assert join_wikitext(" \n = A = \n \n b \n") == "\n\n = A = \n\n\n\n\n b \n"
    assert join_wikitext("a\u2028b\n") == "a\u2028b\n"  # a line ends at a line feed and nowhere else
    path = tmp_path / "wiki.test.raw"
    path.write_text("a \n \n b\n", encoding="utf-8")
    assert load_text(path, tokenizer, 2).protocol == "wikitext2_2"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_an_unreadable_text_is_refused(tokenizer: Any, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LowbitError, match=r"can't read the text .*text\.txt.*UTF-8"):
        load_text(path, tokenizer, 2)
