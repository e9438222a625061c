"""Where formats mix: a compile mode and base dtype that they share, and what is known of the parts there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lowbit.auto.plan import Option, Plan
from lowbit.formats import Format, auto


@dataclass(frozen=True)
class Ground:
    """Where formats mix: one compile mode and base dtype, and the groups that may differ.

    ``whole``: every group must have a format; else one may stay plain, in the base dtype without loss.
    """

    mode: str
    dtype: str
    groups: auto.Groups
    whole: bool = False

    @property
    def mix(self) -> str:
        """The name of the mix."""
        return "auto_mix_native" if self.whole else "auto_mix"


class Timed(NamedTuple):
    """Seconds of one product at batch 1 by the linear's name, head included; of a whole step, where it was at hand."""

    product_s: Mapping[str, float]
    step_s: float | None = None


class Side:
    """A ground of this model, and what is known of its groups."""

    def __init__(self, ground: Ground, layers: int) -> None:
        names = auto.groups(layers, ground.groups)
        self.ground = ground
        self.counts = {group: auto.counts(group, layers, ground.groups) for group in names}
        self.options: dict[str, list[Option]] = {group: [] for group in names}

    def offer(self, row: Format, losses: Mapping[str, float], product_s: Mapping[str, float]) -> None:
        """Groups that may have this format, by their KL."""
        for group, kld in losses.items():
            seconds = sum(count * product_s[name] for name, count in self.counts[group].items())
            self.options[group].append(Option(row.id, kld, seconds))

    def whole_s(self, row: Format, product_s: Mapping[str, float]) -> float:
        """Seconds of all products of a model in this format; a head that it leaves alone is plain."""
        plain = next((option.seconds for option in self.options["head"] if not self.ground.whole), 0.0)
        return sum(
            plain if name == "lm_head" and name not in row.targets else count * product_s[name]
            for counted in self.counts.values()
            for name, count in counted.items()
        )

    def probe(self, group: str, row: Format, known: Mapping[str, Format]) -> Format:
        """The recipe of one group in this format."""
        return auto.mix("auto_probe", {group: row.id}, self.ground.dtype, known, among=self.ground.groups)

    def recipe(self, tried: Plan, known: Mapping[str, Format]) -> Format:
        """A plan's. Raises LowbitError where two libraries want different values of one Inductor flag."""
        ground = self.ground
        return auto.mix(
            ground.mix, tried.formats, ground.dtype, known, note=describe(tried.formats), among=ground.groups
        )


def describe(formats: Mapping[str, str]) -> str:
    """``q, kv, o a16w4_g128-torchao; ends bf16-torch``: groups by format."""
    named: dict[str, list[str]] = {}
    for group, name in formats.items():
        named.setdefault(name, []).append(group)
    return "; ".join(f"{', '.join(members)} {name}" for name, members in named.items())
