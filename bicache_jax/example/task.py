"""The example model's task: short documents of facts about people, and questions about them.

A document is the shared prefix of its questions. Everything is drawn from a seed. Training uses seeds below
`FIRST_HELD_OUT`, boundary calibration uses `CALIBRATION`, and all reported results use seeds from `FIRST_HELD_OUT` on.

| kind | question | answer |
|---|---|---|
| forward | which town does Mara live in | Oslo |
| reverse | who lives in Oslo | Mara |
| list | who drinks tea (several do) | Mara Tom (in any order) |
| about | tell about Mara | Oslo tea chess (in the order live, drink, play, keep) |
| joined | name the drink of the one in Oslo | Mara drinks tea |

The joined answer names the person first, as an intermediate step: once the person is in the canvas, the last word is an
ordinary forward question.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

NAMES = (
    "Ada Amir Anna Arlo Bela Boris Carl Clara Dana Dario Edith Egon Elsa Emil Erik Esme Fay Felix Finn Flora Greta "
    "Gus Hana Hugo Ida Igor Ines Iris Ivan Jana Jonas Josef Karl Kira Lara Leo Lena Lotte Luca Mara Marco Mila Nadia "
    "Nils Nora Olga Omar Otto Paul Petra Pia Rafa Rita Rosa Sami Sara Sven Tara Theo Tom Uma Vera Yara Zoe"
).split()
PLACES = (
    "Oslo Rome Paris Cairo Lima Quito Delhi Tokyo Kyoto Seoul Hanoi Dakar Accra Lagos Tunis Berlin Vienna Prague "
    "Warsaw Dublin London Lisbon Madrid Athens Sofia Riga Tallinn Turin Milan Venice Bern Basel Geneva Bergen Malmo "
    "Porto Seville Havana Boston Denver"
).split()
DRINKS = (
    "tea coffee milk water juice cocoa cider wine beer rum gin vodka lemonade soda cola tonic mead sake punch nectar "
    "broth buttermilk kefir lassi chai matcha espresso latte mocha syrup port sherry brandy whisky absinthe grog "
    "ale stout lager eggnog"
).split()
GAMES = (
    "chess poker tennis golf rugby hockey soccer cricket darts bowls polo squash snooker billiards dominoes checkers "
    "bridge rummy whist go piano violin cello flute harp guitar banjo drums trumpet oboe organ lute viola tuba horn "
    "bassoon clarinet zither sitar accordion"
).split()
PETS = (
    "cats dogs birds fish horses sheep goats cows pigs ducks geese hens bees ants mice rats rabbits ferrets lizards "
    "snakes frogs toads turtles newts parrots finches doves crows owls hawks swans llamas donkeys ponies camels yaks "
    "crabs snails spiders moths"
).split()


@dataclasses.dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        verb: words between person and value in a statement.
        ask: words of a question before the person.
        ends: words of a question after the person.
        noun: kind of the value.
        one: words that refer to a person by this fact.
        values: possible values.
    """

    verb: tuple[str, ...]
    ask: tuple[str, ...]
    ends: tuple[str, ...]
    noun: str
    one: tuple[str, ...]
    values: tuple[str, ...]


RELATIONS = (
    Relation(("lives", "in"), ("which", "town", "does"), ("live", "in"), "town", ("one", "in"), tuple(PLACES)),
    Relation(("drinks",), ("what", "does"), ("drink",), "drink", ("one", "with"), tuple(DRINKS)),
    Relation(("plays",), ("what", "does"), ("play",), "game", ("one", "with"), tuple(GAMES)),
    Relation(("keeps",), ("what", "does"), ("keep",), "pet", ("one", "with"), tuple(PETS)),
)
KINDS = ("forward", "reverse", "list", "about", "joined")
PAD, EOS, MASK, UNKNOWN = "<pad>", "<eos>", "<mask>", "<unk>"
_WORDS = (
    *NAMES,
    *(value for relation in RELATIONS for value in relation.values),
    *(word for relation in RELATIONS for word in (*relation.verb, *relation.ask, *relation.ends, relation.noun)),
    *(word for relation in RELATIONS for word in relation.one),
    *("who", "tell", "about", "name", "the", "of", "."),
)
VOCABULARY: tuple[str, ...] = (PAD, EOS, MASK, UNKNOWN, *dict.fromkeys(_WORDS))
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}

FIRST_HELD_OUT = 10_000
CALIBRATION = 5_000


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answer, as words."""

    kind: str
    words: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def accepted(self) -> str | list[str]:
        """The value of `answer` in a request file: the answer, or every order of a list."""
        if self.kind != "list":
            return " ".join(self.answer)
        return [" ".join(order) for order in itertools.permutations(self.answer)]


@dataclasses.dataclass(frozen=True)
class Document:
    """Facts in the order in which the document states them, person by person: (person, relation, value)."""

    facts: tuple[tuple[str, int, str], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The text."""
        return tuple(word for fact in self.facts for word in statement(*fact))

    def questions(self) -> list[Question]:
        """Every question that the document answers."""
        by_person: dict[str, dict[int, str]] = {}
        holders: dict[tuple[int, str], list[str]] = {}
        for person, relation, value in self.facts:
            by_person.setdefault(person, {})[relation] = value
            holders.setdefault((relation, value), []).append(person)
        found = []
        for person, facts in by_person.items():
            for relation, value in facts.items():
                asked = RELATIONS[relation]
                found.append(Question("forward", (*asked.ask, person, *asked.ends), (value,)))
            if len(facts) > 1:
                found.append(Question("about", ("tell", "about", person), tuple(facts[i] for i in sorted(facts))))
        for (relation, value), people in holders.items():
            kind = "reverse" if len(people) == 1 else "list"
            found.append(Question(kind, ("who", *RELATIONS[relation].verb, value), tuple(people)))
            if len(people) > 1:
                continue
            for other, answer in by_person[people[0]].items():
                if other != relation:
                    words = ("name", "the", RELATIONS[other].noun, "of", "the", *RELATIONS[relation].one, value)
                    found.append(Question("joined", words, statement(people[0], other, answer)[:-1]))
        return found


def statement(person: str, relation: int, value: str) -> tuple[str, ...]:
    """A fact as words."""
    return (person, *RELATIONS[relation].verb, value, ".")


def draw_document(rng: np.random.Generator, people: int, facts: int, repeat: float = 0.15) -> Document:
    """Draws a document.

    Args:
        rng: source of randomness.
        people: number of people.
        facts: facts per person, 1 to 4.
        repeat: probability that a value is shared with another person.
    """
    drawn: list[tuple[str, int, str]] = []
    used: dict[int, list[str]] = {relation: [] for relation in range(len(RELATIONS))}
    # All people have the same kinds of facts, so the kinds do not identify a person.
    relations = rng.choice(len(RELATIONS), facts, replace=False)
    for person in rng.choice(len(NAMES), people, replace=False):
        for relation in rng.permutation(relations):
            taken = used[relation]
            if taken and rng.random() < repeat:
                value = taken[rng.integers(len(taken))]
            else:
                free = [value for value in RELATIONS[relation].values if value not in taken]
                value = free[rng.integers(len(free))]
            taken.append(value)
            drawn.append((NAMES[person], int(relation), value))
    return Document(tuple(drawn))


def ids(words: Sequence[str]) -> list[int]:
    """Token ids of words."""
    return [TOKEN_ID[word] for word in words]


def pick_questions(rng: np.random.Generator, document: Document, count: int) -> list[Question]:
    """Distinct questions, the same number of each kind as far as the document allows."""
    by_kind: dict[str, list[Question]] = {}
    for question in document.questions():
        by_kind.setdefault(question.kind, []).append(question)
    queues = [[group[i] for i in rng.permutation(len(group))] for _, group in sorted(by_kind.items())]
    picked: list[Question] = []
    while len(picked) < count and any(queues):
        for queue in queues:
            if queue and len(picked) < count:
                picked.append(queue.pop())
    return picked


def draw_requests(
    seed: int,
    samples: int,
    *,
    per_document: int = 10,
    people: tuple[int, int] = (4, 12),
    facts: tuple[int, int] = (2, 4),
) -> Iterator[dict[str, Any]]:
    """Draws requests in the form of a request file, each with its `answer` and `kind`.

    Args:
        seed: each seed gives new questions; `FIRST_HELD_OUT` and above were never used in training.
        samples: number of requests.
        per_document: questions that share a document as their prefix.
        people: smallest and largest number of people in a document.
        facts: smallest and largest number of facts per person.

    Yields:
        Requests; `prefix_len` is the document's length in tokens.
    """
    rng = np.random.default_rng([seed, 1])
    count = 0
    while count < samples:
        document = draw_document(
            rng, int(rng.integers(people[0], people[1] + 1)), int(rng.integers(facts[0], facts[1] + 1))
        )
        for question in pick_questions(rng, document, min(per_document, samples - count)):
            yield {
                "id": f"{seed}-{count}",
                "prompt": " ".join((*document.words, *question.words)),
                "prefix_len": len(document.words),
                "answer": question.accepted,
                "kind": question.kind,
            }
            count += 1
