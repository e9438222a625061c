"""Stories for the embedded model: our own English-like text, the same from the same seed everywhere.

A story fixes its facts first (a town, three people with their trades, animals, belongings and fears, a password, a
song, a list, a week's duties) and then returns to them hundreds of tokens later: in dialogues, refrains, recaps. A
model that sees 512 tokens can know what one that sees 64, or two, cannot. ``words.py`` holds the vocabulary.

Only ``random.Random(int).random()`` is drawn from, the one sequence that Python promises to keep between versions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lowbit.embedded import words

T = TypeVar("T")

TRAINING_SEED = 20261121
HELDOUT_SEED = 31415926
HELDOUT_STORIES = 19
TOKENIZER_STORIES = 1500

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass
class Person:
    """One of a story's people; prints as the first name. Every field is fixed for the whole story."""

    name: str
    full: str
    he: str
    his: str
    age: int
    trade: str
    home: str
    pet: str
    petname: str
    coat: str
    material: str
    thing: str
    dish: str
    fear: str
    habit: str

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return self.name

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()


class Dice:
    """Draws from the one generator sequence that is stable between Python versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def chance(self, share: float) -> bool:
        return self._random() < share

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[T], n: int) -> list[T]:
        """n different ones, in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(n)]


class Story:
    """One story: its facts, then ``tell`` writes it."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = Dice(seed)
        self.town = dice.pick(words.FIRST) + dice.pick(words.LAST)
        self.people = self._people(3)
        self.theme = dice.pick(sorted(words.SPOTS))
        self.sky = dice.pick(sorted(words.WEATHERS))
        self.word = f"{dice.pick(words.COLOURS)} {dice.pick(words.THINGS)} {dice.pick(words.NUMBERS)}"
        self.holder = {person.name: person for person in self.people}
        self.song = [self._song_line() for _ in range(3)]
        self.goods = [f"{dice.pick(words.NUMBERS)} {g}" for g in dice.sample(words.GOODS, 3 + dice.below(4))]
        chores = dice.sample(range(len(words.CHORES)), len(words.DAYS))
        self.duties = [(day, dice.pick(self.people), chore) for day, chore in zip(words.DAYS, chores, strict=True)]

    def _people(self, count: int) -> list[Person]:
        dice = self.dice
        women = [dice.chance(0.5) for _ in range(count)]
        names = dice.sample(words.WOMEN, count), dice.sample(words.MEN, count)
        # one of a kind each, so that every fact has one owner
        columns = [
            dice.sample(options, count)
            for options in (
                *(words.TRADES, words.HOMES, words.PETS, words.PET_NAMES, words.COLOURS, words.MATERIALS),
                *(words.THINGS, words.DISHES, words.FEARS, words.HABITS),
            )
        ]
        people = []
        for i, (woman, facts) in enumerate(zip(women, zip(*columns, strict=True), strict=True)):
            name = names[0][i] if woman else names[1][i]
            full = f"{name} {dice.pick(words.FIRST)}{dice.pick(words.LAST)}"
            he, his = ("she", "her") if woman else ("he", "his")
            people.append(Person(name, full, he, his, 11 + dice.below(80), *facts))
        return people

    def _song_line(self) -> str:
        dice = self.dice
        subject = dice.pick(words.SONG_SUBJECTS).capitalize()
        return f"{subject} {dice.pick(words.SONG_VERBS)} {dice.pick(words.SONG_OBJECTS)} {dice.pick(words.SONG_ENDS)}"

    def write(self, template: str, **facts: Person) -> str:
        """The sentence: facts filled in, free choices made."""
        dice = self.dice
        weather, view = dice.pick(words.WEATHERS[self.sky]), dice.pick(words.VIEWS[self.theme])
        text = _CHOICE.sub(lambda choice: dice.pick(choice[1].split("|")), template)
        a, b, c = self.people
        return text.format(
            a=a, b=b, c=c, town=self.town, word=self.word, spot=dice.pick(words.SPOTS[self.theme]), view=view,
            weather=weather, weather_cap=weather[0].upper() + weather[1:], **facts,
        )  # fmt: skip

    def pair(self) -> dict[str, Person]:
        p, q = self.dice.sample(self.people, 2)
        return {"p": p, "q": q}

    # Paragraphs: each returns its text.

    def introduce(self, person: Person, first: bool) -> str:
        head = self.write(self.dice.pick(words.OPENINGS if first else words.ARRIVALS), p=person)
        rest = self.dice.sample(words.INTRODUCTIONS, len(words.INTRODUCTIONS) - self.dice.below(2))
        return " ".join([head, *(self.write(sentence, p=person) for sentence in rest)])

    def scene(self) -> str:
        return " ".join(self.write(s, **self.pair()) for s in self.dice.sample(words.SCENES, 2 + self.dice.below(3)))

    def dialogue(self) -> str:
        lines = []
        for question, answer in self.dice.sample(words.QUESTIONS, 2 + self.dice.below(3)):
            pair = self.pair()
            lines += [self.write(question, **pair), self.write(answer, **pair)]
        return "\n".join(lines)

    def riddle(self) -> str:
        p, q, r = self.dice.sample(self.people, 3)
        clauses = " and ".join(self.dice.sample(words.CLAUSES, 2))
        question, answer = words.RIDDLE
        return self.write(question.replace("{clauses}", clauses), p=p, q=q) + "\n" + self.write(answer, p=p, r=r)

    def register(self) -> str:
        rows = [f"{i}. {self.write(words.REGISTER, p=person)}" for i, person in enumerate(self.people, 1)]
        return "\n".join([self.write("In the [book|register] of {town} stood:"), *rows])

    def rumour(self) -> str:
        clauses = zip(("{one}", "{two}", "{three}"), self.dice.sample(words.CLAUSES, 3), strict=True)
        sentence = words.RUMOUR
        for slot, clause in clauses:
            sentence = sentence.replace(slot, clause)
        return self.write(sentence, p=self.dice.pick(self.people))

    def gift(self) -> str:
        owner, receiver = self.dice.pick(self.people), self.dice.pick(self.people)
        giver = self.holder[owner.name]
        if giver is receiver:
            return self.holding()
        self.holder[owner.name] = receiver
        return self.write(self.dice.pick(words.GIFTS), p=giver, q=receiver, o=owner)

    def holding(self) -> str:
        owner = self.dice.pick(self.people)
        holder = self.holder[owner.name]
        q, r = self.dice.sample([person for person in self.people if person is not holder], 2)
        return self.write(self.dice.pick(words.HOLDING), o=owner, h=holder, q=q, r=r)

    def shopping(self) -> str:
        lines = [f"{i}. {good}" for i, good in enumerate(self.goods, 1)]
        return "\n".join([self.write("{p} wrote a list for the market of {town}:", **self.pair()), *lines])

    def checking(self) -> str:
        i = self.dice.below(len(self.goods))
        parts = [f"The {words.ORDINALS[i]} thing on the list was {self.goods[i]}."]
        if self.dice.chance(0.6):
            parts.append(self.write("{p} read the whole list again: ", **self.pair()) + ", ".join(self.goods) + ".")
        return " ".join(parts)

    def rota(self) -> str:
        lines = [f"{day}: {person} must {words.CHORES[chore]}." for day, person, chore in self.duties]
        return "\n".join([self.write("[The duties|The work] of the week:"), *lines])

    def working(self) -> str:
        day, person, chore = self.dice.pick(self.duties)
        return f"On {day} {person} {words.CHORES_PAST[chore]}, " + self.write("[as agreed|while {view}|and {weather}].")

    def sing(self) -> str:
        start = self.write("[{p} sang|{p} and {q} sang|They all sang|Somebody sang] the song of {town}:", **self.pair())
        return "\n".join([start, *(f"  {line}," for line in self.song[:-1]), f"  {self.song[-1]}."])

    def password(self) -> str:
        sentence = '"The secret word is {word}," {p} [told|said to] {q}. "[Never forget it|Keep it well|Tell nobody]."'
        return self.write(sentence, **self.pair())

    def tell(self) -> str:
        """The whole story: title, people, events in random order, an ending."""
        a, b, c = self.people
        dice = self.dice
        events: list[Callable[[], str]] = [
            *(self.scene, self.scene, self.dialogue, self.dialogue, self.gift, self.holding),
            *(self.riddle, self.riddle, self.rumour, self.rumour, self.register),
        ]
        setups = dice.sample(
            [(self.shopping, self.checking), (self.rota, self.working), (self.sing, self.sing)], 1 + dice.below(2)
        )
        paragraphs = [f"The {a.trade.title()} of {self.town}", self.introduce(a, True), self.password()]
        paragraphs += [self.introduce(b, False), *(setup() for setup, _ in setups), self.introduce(c, False)]
        events += [again for _, again in setups for _ in range(2)]
        paragraphs += [event() for event in dice.sample(events, 6 + dice.below(5))]
        paragraphs.append(" ".join(self.write(s) for s in dice.sample(words.ENDINGS, 2)))
        return _ARTICLE.sub(r"\1n ", "\n".join(paragraphs))


def tell_stories(seed: int, count: int, start: int = 0) -> Iterator[str]:
    """Stories ``start`` to ``start + count`` of a seed; story i depends on the seed and i alone."""
    for i in range(start, start + count):
        yield Story(seed * 1_000_003 + i).tell()


def join_stories(stories: Iterator[str]) -> str:
    """As text: a blank line between two stories, a newline at the end."""
    return "\n\n".join(stories) + "\n"


def write_heldout() -> str:
    """The text of heldout.txt: stories of a seed that training never sees."""
    return join_stories(tell_stories(HELDOUT_SEED, HELDOUT_STORIES))
