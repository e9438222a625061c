"""A token trigram with interpolated modified Kneser-Ney smoothing: what the embedded model has to beat by half.

Source of the method: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998),
section 3. The nine discounts (for counts 1, 2, 3+ at each of three orders) start at its closed form and are then tuned
by coordinate descent on a development text, so that the comparison is with a trigram at its best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """Counts of one n-gram order. ``keys`` are sorted n-grams as numbers in base ``vocab``.

    ``total`` is the sum of a context's counts, ``kinds`` [contexts, 3] how many of its n-grams have count 1, 2, 3+.
    """

    vocab: int
    keys: Ints
    counts: Ints
    contexts: Ints
    total: Ints
    kinds: Ints

    @classmethod
    def count(cls, vocab: int, keys: Ints, counts: Ints) -> Order:
        """keys: sorted, different; counts: how often each (or in how many left contexts each) was seen."""
        contexts, start = np.unique(keys // vocab, return_index=True)
        kinds = np.stack([np.add.reduceat((np.minimum(counts, 3) == k).astype(np.int64), start) for k in (1, 2, 3)], 1)
        return cls(vocab, keys, counts, contexts, np.add.reduceat(counts, start), kinds)

    def closed_form(self) -> Floats:
        """Chen and Goodman's discounts from the counts of counts, equation 26."""
        n = [max(int((self.counts == k).sum()), 1) for k in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        raw = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
        discounts: Floats = np.clip(np.array(raw), 0.01, [0.99, 1.99, 2.99])
        return discounts

    def look_up(self, keys: Ints) -> tuple[Ints, Ints, Ints]:
        """Per n-gram asked: its count (0 if unseen), its context's total (0 if unseen) and kinds."""
        count = _find(self.keys, self.counts, keys)
        context = keys // self.vocab
        return count, _find(self.contexts, self.total, context), _find(self.contexts, self.kinds, context)


def _find(keys: Ints, values: Ints, asked: Ints) -> Ints:
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    hit = keys[place] == asked
    return np.where(hit.reshape(-1, *[1] * (values.ndim - 1)), values[place], 0)


def _interpolate(found: tuple[Ints, Ints, Ints], discounts: Floats, lower: Floats) -> Floats:
    count, total, kinds = found
    off = np.where(count > 0, discounts[np.minimum(count, 3) - 1], 0.0)
    seen = np.maximum(total, 1)
    return np.where(total > 0, (count - off + kinds @ discounts * lower) / seen, lower)


class Trigram:
    """p(w | u v) from training tokens; ``tune`` sets the discounts, ``probabilities`` scores."""

    def __init__(self, ids: Ints, vocab: int) -> None:
        """ids: [tokens], each below vocab (at most 2**20, so that three fit an int64)."""
        ids = np.asarray(ids, dtype=np.int64)
        three = (ids[:-2] * vocab + ids[1:-1]) * vocab + ids[2:]
        three_keys, three_counts = np.unique(three, return_counts=True)
        # the lower orders count left contexts, not occurrences: that is Kneser-Ney's idea
        two_keys, two_counts = np.unique(three_keys % vocab**2, return_counts=True)
        one_keys, one_counts = np.unique(two_keys % vocab, return_counts=True)
        self.vocab = vocab
        self.orders = [
            Order.count(vocab, keys, counts)
            for keys, counts in ((one_keys, one_counts), (two_keys, two_counts), (three_keys, three_counts))
        ]
        self.discounts = [order.closed_form() for order in self.orders]

    def _look_up(self, ids: Ints) -> list[tuple[Ints, Ints, Ints]]:
        ids = np.asarray(ids, dtype=np.int64)
        u, v, w = ids[:-2], ids[1:-1], ids[2:]
        keys = (w, v * self.vocab + w, (u * self.vocab + v) * self.vocab + w)
        return [order.look_up(k) for order, k in zip(self.orders, keys, strict=True)]

    def _mix(self, found: list[tuple[Ints, Ints, Ints]]) -> Floats:
        p: Floats = np.full(len(found[0][0]), 1.0 / self.vocab)
        for one, discounts in zip(found, self.discounts, strict=True):
            p = _interpolate(one, discounts, p)
        return p

    def probabilities(self, ids: Ints) -> Floats:
        """p(ids[i] | ids[i-2], ids[i-1]) for i from 2: [tokens - 2]. Every next token has p > 0; they sum to 1."""
        return self._mix(self._look_up(ids))

    def tune(self, ids: Ints, rounds: int = 2) -> None:
        """Coordinate descent of the nine discounts on a development text (neither training nor held-out)."""
        found = self._look_up(ids)
        for _ in range(rounds):
            for discounts in self.discounts:
                for k in range(3):
                    losses = {}
                    for value in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
                        discounts[k] = value * (k + 1)
                        losses[float(discounts[k])] = -float(np.log(self._mix(found)).mean())
                    discounts[k] = min(losses, key=losses.__getitem__)
