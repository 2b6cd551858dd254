"""A task with answers that need a document that has read the text after it: trips, and rules that sort the towns.

The document, which is the shared prefix, says who went from which town to which. The suffix begins with a rule that
says in which region each town lies; each question has its own rule. The meaning of a trip depends on the rule.

| kind | question | answer |
|---|---|---|
| towns | from Oslo to Cairo went | Mara |
| regions | from northern to southern went | Mara |
| within | within one region went | Mara |

The first kind needs no rule. The second could be answered without a document that has read the rule: the question could
first collect the towns of its two regions. For the third, the rule has to be applied to both towns of each trip.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from structured_start import at_offset, slow_dimensions

from bicache_jax.core.config import ModelConfig
from bicache_jax.example import task
from bicache_jax.models import init

KINDS = ("towns", "regions", "within")
REGIONS = ("northern", "southern", "eastern", "western")
WORDS = (*task.VOCABULARY, "from", "to", "went", "within", "region", *REGIONS)
TOKEN_ID = {word: index for index, word in enumerate(WORDS)}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as words, and the person who is the answer."""

    kind: str
    words: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Document:
    """Trips: from where, to where, who.

    Attributes:
        trips: no two between the same towns.
        towns: all towns that a rule sorts.
    """

    trips: tuple[tuple[str, str, str], ...]
    towns: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The text."""
        return tuple(word for a, b, name in self.trips for word in ("from", a, "to", b, "went", name, "."))

    def questions(self, region: dict[str, str]) -> list[Question]:
        """All questions with exactly one answer under a rule."""
        kinds = [(region[a], region[b]) for a, b, _ in self.trips]
        found = []
        for (a, b, name), kind in zip(self.trips, kinds, strict=True):
            found.append(Question("towns", ("from", a, "to", b, "went"), name))
            if kind[0] == kind[1]:
                found.append(Question("within", ("within", "one", "region", "went"), name))
            elif kinds.count(kind) == 1:
                found.append(Question("regions", ("from", kind[0], "to", kind[1], "went"), name))
        return found


def draw_document(rng: np.random.Generator, people: int, towns: int) -> Document:
    """Draws a trip of each of `people` between two of `towns` towns.

    Raises:
        ValueError: there are so few towns that no two lie in one region.
    """
    if towns <= len(REGIONS):
        raise ValueError(f"towns must be more than {len(REGIONS)}, so that two lie in one region; got {towns}")
    names = rng.choice(len(task.NAMES), people, replace=False)
    places = tuple(task.PLACES[index] for index in rng.choice(len(task.PLACES), towns, replace=False))
    pairs = list(itertools.combinations(places, 2))
    trips = []
    for pair, name in zip(rng.choice(len(pairs), people, replace=False), names, strict=True):
        a, b = pairs[pair][:: rng.choice([1, -1])]
        trips.append((a, b, task.NAMES[name]))
    return Document(tuple(trips), places)


def draw_rule(rng: np.random.Generator, document: Document) -> tuple[dict[str, str], tuple[str, ...]]:
    """Draws a region for each town, so that exactly one trip stays within a region; as a mapping and as text."""
    while True:
        order = [document.towns[index] for index in rng.permutation(len(document.towns))]
        region = {town: REGIONS[index % len(REGIONS)] for index, town in enumerate(order)}
        if sum(region[a] == region[b] for a, b, _ in document.trips) == 1:
            break
    told = rng.permutation(len(order))
    return region, tuple(word for index in told for word in (order[index], region[order[index]], "."))


def draw_requests(
    seed: int, samples: int, *, per_document: int = 12, people: int = 8, towns: int = 10
) -> Iterator[dict[str, Any]]:
    """Draws requests in the form of a request file, each with its own rule; the kinds alternate.

    Args:
        seed: each seed gives new documents; `task.FIRST_HELD_OUT` and above were never used in training.
        samples: number of requests.
        per_document: requests that share a document as their prefix.
        people: trips in a document.
        towns: towns in a document.
    """
    rng = np.random.default_rng([seed, 3])
    document = draw_document(rng, people, towns)
    for count in range(samples):
        if count % per_document == 0:
            document = draw_document(rng, people, towns)
        known: list[Question] = []
        while not known:
            region, rule = draw_rule(rng, document)
            known = [question for question in document.questions(region) if question.kind == KINDS[count % len(KINDS)]]
        question = known[rng.integers(len(known))]
        yield {
            "id": f"{seed}-{count}",
            "prompt": " ".join((*document.words, *rule, *question.words)),
            "prefix_len": len(document.words),
            "answer": question.answer,
            "kind": question.kind,
        }


def trips_start(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Initial parameters: heads that keep words at fixed offsets, and heads that find words after the same words.

    The width is split into four parts; the first holds the word itself. Layer 0 copies the words one, two and four
    positions earlier into the others. In later layers, one head finds words two after the same word, one finds words
    two after the word four positions earlier, and one finds words for which both match; each adds the word that it
    finds. So words of the document and of the question can read the rule in layer 1 from the first step on. Everything
    is trained afterwards.

    Args:
        config: an architecture with four heads, each as wide as a part.
        seed: seed of the noise.

    Returns:
        The tree of `bicache_jax.models.init`.
    """
    rng = np.random.default_rng(seed)
    params: Any = jax.tree.map(np.array, init(config, jax.random.key(seed)))
    width, head, layers = config.d_model, config.head_dim, params["layers"]
    assert width == 4 * head and config.num_heads == 4
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0].T
    direction, blank = basis[:2]
    parts = np.zeros((4, head, width))
    parts[:3] = basis[2 : 2 + 3 * head].reshape(3, head, width)
    parts[3, : head - 2] = basis[2 + 3 * head :]
    own, size = parts[0], 0.5 * np.sqrt(width)

    tokens = rng.normal(size=(config.vocab_size, head))
    tokens = tokens * (size / np.linalg.norm(tokens, axis=1, keepdims=True)) @ own
    tokens[config.mask_id] = 0
    params["embed"] = tokens + direction * size
    params["embed"][config.mask_id] += blank * size
    params["head"] = tokens / (0.25 * np.sqrt(width)) * 0.5
    slow = slow_dimensions(config) * 1.8

    def noise() -> np.ndarray:
        return 0.2 * rng.normal(size=(width, head)) / np.sqrt(width)

    near = ((-2, 1, 1.0), (-4, 2, 1.0), (-1, 3, 1.0), (1, 3, 0.0))  # offset, part it goes to, how much
    alike = (((1,), (3,), 1, 0.5), ((2,), (3,), 2, 0.5), ((1, 2), (1, 2), 0, 0.5), ((3,), (3,), 3, 0.3))
    for layer in range(config.num_layers):
        queries, keys, outputs = [], [], []
        for index in range(config.num_heads):
            if layer == 0:
                offset, to, gain = near[index]
                query, key = (np.outer(direction, side) * 0.92 for side in at_offset(offset, config))
            else:
                asked, held, to, gain = alike[index]
                turns = [np.linalg.qr(rng.normal(size=(head, head)))[0] * slow for _ in asked]
                query = sum(parts[part].T @ turn for part, turn in zip(asked, turns, strict=True))
                key = sum(parts[part].T @ turn for part, turn in zip(held, turns, strict=True))
            queries.append(query + noise())
            keys.append(key + noise())
            outputs.append(parts[to] * gain)
        for name, stack in (("q", queries), ("k", keys), ("v", [own.T] * config.num_heads)):
            layers[name]["weight"][layer] = np.concatenate(stack, axis=1).T
        layers["o"]["kernel"][layer] = np.concatenate(outputs, axis=0)
        layers["down"]["kernel"][layer] = 0
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
