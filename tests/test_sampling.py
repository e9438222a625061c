"""Sampling: the right tokens are left in, in the right proportions, and a seed gives them again."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from lowbit import sampling
from lowbit.errors import LowbitError
from lowbit.sampling import GREEDY, Sampler, Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -30.0])
DRAWS = 20_000


def draws(settings, logits=LOGITS, count=DRAWS):
    """Tokens of ``count`` rows that all see the same logits."""
    return Sampler(settings, count, "cpu")(logits.expand(count, -1)).flatten()


def proportions_fit(tokens, probabilities):
    """Chi-squared of the counts against the probabilities; nothing that has none may occur."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    likely = probabilities * len(tokens) > 5
    assert counts[~likely].sum() <= 5
    if likely.sum() == 1:
        return bool(counts[likely] >= len(tokens) - 5)
    expected = probabilities[likely] / probabilities[likely].sum() * counts[likely].sum()
    return stats.chisquare(counts[likely].numpy(), expected.numpy()).pvalue > 1e-4


def reference(logits, settings):
    """Probabilities by transformers' own warpers."""
    from transformers.generation import logits_process

    scores = logits.double().unsqueeze(0) / settings.temperature
    if settings.top_k:
        scores = logits_process.TopKLogitsWarper(settings.top_k)(None, scores)
    if settings.top_p < 1:
        scores = logits_process.TopPLogitsWarper(settings.top_p)(None, scores)
    return scores.softmax(-1).squeeze(0)


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(2.0, seed=7),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=100),
        Sampling(1.0, top_p=0.7),
        Sampling(1.0, top_p=1e-9),
        Sampling(1.5, top_k=4, top_p=0.9),
    ],
    ids=str,
)
def test_proportions_are_those_of_the_softmax(settings):
    assert proportions_fit(draws(settings), reference(LOGITS, settings))


def test_a_flat_distribution_is_drawn_evenly():
    tokens = draws(Sampling(1.0), torch.zeros(1000), 8000)
    assert proportions_fit(tokens, torch.full((1000,), 1e-3, dtype=torch.float64))


def test_draws_one_after_the_other_are_as_random_as_rows():
    sampler = Sampler(Sampling(1.0, seed=3), 1, "cpu")
    tokens = torch.cat([sampler(LOGITS.view(1, 1, -1)) for _ in range(3000)]).flatten()
    assert proportions_fit(tokens, reference(LOGITS, Sampling(1.0)))
    pairs = (tokens[:-1] == tokens[1:]).double().mean().item()
    assert pairs == pytest.approx((reference(LOGITS, Sampling(1.0)) ** 2).sum().item(), abs=0.05)


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_the_filter_keeps_what_transformers_keeps(top_k, top_p):
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
    got = sampling.filtered(logits.double(), torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))
    for row, kept in zip(logits, got, strict=True):
        want = reference(row, Sampling(1.0, top_k=top_k, top_p=top_p)) > 0
        assert torch.equal(kept.isfinite(), want)
    assert torch.equal(got[got.isfinite()], logits.double()[got.isfinite()])


def test_top_k_of_zero_keeps_all():
    got = sampling.filtered(LOGITS.double().view(1, -1), torch.tensor([0]), torch.ones(1, dtype=torch.float64))
    assert got.isfinite().all()


def test_greedy_is_the_argmax_and_draws_nothing():
    logits = torch.randn(3, 1, 50)
    sampler = Sampler(GREEDY, 3, "cpu")
    assert torch.equal(sampler(logits), logits.view(3, 50).argmax(-1, keepdim=True))
    assert sampler.drawn.item() == 0


def test_a_cold_temperature_comes_to_greedy():
    logits = torch.randn(64, 50)
    assert torch.equal(Sampler(Sampling(1e-6), 64, "cpu")(logits), logits.argmax(-1, keepdim=True))


def test_a_seed_gives_the_same_tokens_and_another_one_others():
    logits = torch.randn(4, 500)

    def run(settings):
        sampler = Sampler(settings, 4, "cpu")
        return torch.cat([sampler(logits) for _ in range(32)], 1)

    first = run(Sampling(1.0, seed=11))
    assert torch.equal(first, run(Sampling(1.0, seed=11)))
    assert (first != run(Sampling(1.0, seed=12))).double().mean() > 0.5
    sampler = Sampler(Sampling(1.0, seed=12), 4, "cpu")
    sampler(logits)
    sampler.set(Sampling(1.0, seed=11))
    assert torch.equal(torch.cat([sampler(logits) for _ in range(32)], 1), first)


def test_the_numbers_never_change():
    """A stored seed must give the same text after an upgrade, and on every device."""
    seed, draw, rows = torch.tensor([5]), torch.tensor([2]), torch.tensor([[0], [1]])
    got = sampling.exponential(seed, draw, rows, 3)
    want = [
        [0.6073414862373492, 0.4609782285599533, 0.9098569342007498],
        [0.1300224982652535, 0.5093490009276175, 0.034676957475914955],
    ]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14)


def test_the_mixer_is_splitmix64():
    def splitmix64(state):
        value = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    states = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 1234567890123456789]
    signed = torch.tensor([sampling._signed(state) for state in states])
    assert [value % 2**64 for value in sampling.mix(signed).tolist()] == [splitmix64(state) for state in states]
    # the first number of the sequence that starts at 1234567 (published with the algorithm's reference code)
    assert sampling.mix(torch.tensor([1234567 + sampling.GAMMA])).item() % 2**64 == 6457827717110365317


def test_exponentials_have_mean_and_variance_one():
    got = sampling.exponential(torch.tensor([0]), torch.tensor([0]), torch.arange(64).unsqueeze(1), 4096)
    assert got.isfinite().all()
    assert (got > 0).all()
    assert got.mean().item() == pytest.approx(1, abs=0.01)
    assert got.var().item() == pytest.approx(1, abs=0.02)
    assert stats.kstest(got.flatten()[:50_000].numpy(), "expon").pvalue > 1e-4
    assert abs(torch.corrcoef(got[:2])[0, 1].item()) < 0.06  # neighbouring rows


def test_the_sampler_is_one_graph_without_a_wait():
    """What a CUDA graph demands, as far as a CPU can tell: no data-dependent Python and no change of shape."""
    for settings in (GREEDY, Sampling(0.8), Sampling(0.8, top_k=5, top_p=0.9)):
        eager, traced = Sampler(settings, 2, "cpu"), Sampler(settings, 2, "cpu")
        compiled = torch.compile(traced, backend="aot_eager", fullgraph=True, dynamic=False)
        for _ in range(3):
            logits = torch.randn(2, 1, 50)
            assert torch.equal(compiled(logits), eager(logits))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0, expected a finite number of 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1, expected 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0, expected a number above 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(LowbitError, match=message):
        Sampling(**values)


def test_a_sampler_keeps_its_kind():
    assert [Sampling().kind, Sampling(1.0).kind, Sampling(1.0, top_k=2).kind] == ["greedy", "random", "filtered"]
    with pytest.raises(LowbitError, match="this sampler is for greedy sampling, got"):
        Sampler(GREEDY, 1, "cpu").set(Sampling(1.0))
