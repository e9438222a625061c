from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lowbit import dummy

NAME = "model.layers.0.self_attn.q_proj.weight"
FIRST = [48117, 48371, 15450, 15614, 48265, 48341]
DIGEST = "dbc7699d8c37f4a683490f4028d40cd6"


def source(total=0):
    with ThreadPoolExecutor(2) as workers:
        return dummy.Source(total, workers)


def make(name, count, start=0, total=0):
    out = np.empty(count, dtype=np.uint16)
    source(total).fill(out, name, start)
    return out


def as_float(bits):
    return torch.from_numpy(bits).view(torch.bfloat16).double()


def test_the_bits_are_the_same_everywhere_and_for_ever():
    """Literals: a change of numpy, Python, torch, platform or of this code that moves one bit shows here."""
    bits = make(NAME, 64 * 48)
    assert bits[:6].tolist() == FIRST
    assert hashlib.blake2b(bits.astype("<u2").tobytes(), digest_size=16).hexdigest() == DIGEST


def test_the_definition_in_plain_integers():
    mask = 2**64 - 1
    for place in range(40):
        position = (dummy.offset(NAME) + place) % dummy.PERIOD
        z = (position // 4 + dummy.SEED) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        uniform = ((z ^ z >> 31) >> 16 * (position % 4)) & 0xFFFF
        value = torch.tensor(NormalDist(0, 0.02).inv_cdf((uniform + 0.5) / 65536)).bfloat16()
        assert as_float(make(NAME, 1, place)).item() == value.item()


def test_every_quantile_is_the_nearest_bf16_of_the_normal_distribution():
    normal = NormalDist(0, 0.02)
    expected = torch.tensor([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=torch.float64)
    table = as_float(dummy._quantiles())
    assert ((table - expected).abs() <= expected.abs() * 2**-8).all()
    assert torch.equal(table, -table.flip(0))


def test_values_are_normal_with_the_initializers_deviation():
    values = as_float(make(NAME, 2_000_000))
    assert abs(values.mean().item()) < 4 * 0.02 / math.sqrt(len(values))
    assert values.std().item() == pytest.approx(0.02, rel=0.002)
    standard = values / 0.02
    assert (standard**3).mean().item() == pytest.approx(0, abs=0.01)
    assert (standard**4).mean().item() == pytest.approx(3, rel=0.01)


def test_neighbours_rows_and_other_tensors_are_uncorrelated():
    values = as_float(make(NAME, 1_000_000)).view(1000, 1000)
    other = as_float(make(NAME.replace("layers.0", "layers.1"), 1_000_000)).view(1000, 1000)
    pairs = [(values[:, lag:], values[:, : 1000 - lag]) for lag in (1, 2, 3, 4)]
    for a, b in [*pairs, (values[1:], values[:-1]), (values, other)]:
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation.item()) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 1021])
def test_a_piece_equals_that_part_of_the_whole(start):
    assert np.array_equal(make(NAME, 3000, start), make(NAME, 3000 + start)[start:])


def test_pieces_meet_across_the_chunks_they_are_made_in(monkeypatch):
    whole = make(NAME, 5000)
    monkeypatch.setattr(dummy, "CHUNK", 512)
    assert np.array_equal(make(NAME, 5000), whole)


def test_a_large_model_copies_from_one_period_and_gets_the_same_bits(monkeypatch):
    monkeypatch.setattr(dummy, "PERIOD", 40_009)
    monkeypatch.setattr(dummy, "CHUNK", 1024)
    small, large = make(NAME, 100_000, 7, total=0), make(NAME, 100_000, 7, total=40_010)
    assert source(40_010)._period is not None
    assert source(0)._period is None
    assert np.array_equal(small, large)
    assert np.array_equal(small[:50_000], small[40_009:90_009])


def test_norms_are_ones_and_biases_zeros():
    for name in ("model.norm.weight", "model.layers.3.input_layernorm.weight"):
        assert (as_float(make(name, 64)) == 1).all()
    assert (as_float(make("model.layers.3.mlp.up_proj.bias", 64)) == 0).all()
