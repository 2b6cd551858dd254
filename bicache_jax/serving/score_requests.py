"""Texts to be scored: a prompt with what may follow it, read from objects, tokens cut where the prompt ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.score import Estimate, Score
from bicache_jax.core.types import Tokenizer
from bicache_jax.serving.admission import Errors, admit_each, entries_of
from bicache_jax.serving.fields import NOTES, SEED_LIMIT, BadRequest, check_keys, encodable, flag, integer, shown
from bicache_jax.serving.prompts import chat_prompt, text_prompt, token_prompt
from bicache_jax.serving.requests import error_result, request_name

PROMPTS = ("prompt", "messages", "prompt_ids")
TEXTS = ("continuation", "choices", "continuation_ids", "choices_ids")
KEYS = ("id", *PROMPTS, *TEXTS, "prefix_len", "seed", "greedy", *NOTES)
MOST_CHOICES = 4096
_FORMS = 'a dict such as {"prompt": text, "continuation": text} or {"prompt": text, "choices": [text, ...]}'


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A prompt and the texts that may follow it, tokenised.

    Attributes:
        id: name of the request; part of what its samples are drawn from.
        prompt_ids: the whole prompt, prefix included.
        texts: tokens of each text.
        sizes: bytes of each text; None where it was given as tokens.
        prefix_len: tokens of the prompt that are its shared prefix; None: to be found.
        prefix_from_messages: whether `prefix_len` follows from the conversation rather than being given.
        seed: seed of its samples.
        greedy: whether to say, of each text, if greedy decoding gives it.
        index: place in the input, from 0.
    """

    id: str
    prompt_ids: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    sizes: tuple[int | None, ...] = ()
    prefix_len: int | None = None
    prefix_from_messages: bool = False
    seed: int = 0
    greedy: bool = False
    index: int = 0

    @property
    def n(self) -> int:
        """Scores that it has, as results have samples."""
        return 1


# As in `admission`, wrong types get a message of ours.
if TYPE_CHECKING:
    Scorable: TypeAlias = Mapping[str, Any] | ScoreRequest | Iterable[Mapping[str, Any] | ScoreRequest]
else:
    Scorable = Any


@runtime_checkable
class Encoder(Protocol):
    """What texts are cut with."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""
        ...


def cut(prompt: str, texts: Sequence[str], tokenizer: Encoder) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Tokens of a prompt, and of each text behind it.

    A text's tokens are those of prompt and text together behind as many as the prompt has alone, and white space at the
    prompt's end belongs to the text: words keep the tokens that they have in running text. That is how
    lm-evaluation-harness and LLaDA's evaluation cut them.

    Args:
        prompt: the prompt.
        texts: what may follow it.
        tokenizer: the model's.
    """
    begins = prompt.rstrip()
    ids = tokenizer.encode(begins)
    return ids, [tokenizer.encode(prompt + text)[len(ids) :] for text in texts]


def _bare(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of a text without those that the tokenizer puts around every text."""
    around, ids = tokenizer.encode(""), tokenizer.encode(text)
    for front in range(len(around), -1, -1):
        behind = len(around) - front
        if ids[:front] == around[:front] and ids[len(ids) - behind :] == around[front:]:
            return ids[front : len(ids) - behind]
    return ids


@dataclasses.dataclass(frozen=True)
class ScoreParser:
    """Makes requests to score of objects.

    Attributes:
        config: architecture of the model they are for.
        tokenizer: its tokenizer; without one only token ids can be scored.
        seed: seed of a request that names none.
        estimate: how they are scored, which may limit their length.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    seed: int = 0
    estimate: Estimate = Estimate()

    def parse(self, record: Mapping[str, Any], name: str, index: int) -> ScoreRequest:
        """The request that an object describes.

        Args:
            record: the object.
            name: id of the request.
            index: its place in the input.

        Raises:
            BadRequest: it describes none.
        """
        check_keys(record, KEYS, "a request to score")
        prompt, text = (self._one(record, fields) for fields in (PROMPTS, TEXTS))
        prefix_len: int | None = None
        sizes: tuple[int | None, ...]
        if text.endswith("_ids"):
            lists = [record[text]] if text == "continuation_ids" else _listed(record[text], text)
            texts = [token_prompt(ids, self.config, text) for ids in lists]
            sizes = (None,) * len(texts)
        else:
            words = [record[text]] if text == "continuation" else _listed(record[text], text)
            for one in words:
                if not isinstance(one, str):
                    raise BadRequest(f"{text!r} must hold text, got {shown(one)}")
                encodable(one, text)
            sizes = tuple(len(one.encode()) for one in words)
            if self.tokenizer is None:
                raise BadRequest(f"the model has no tokenizer files; give '{text}_ids' instead of {text!r}")
            if prompt != "prompt":
                texts = [_bare(one, self.tokenizer) for one in words]
        if prompt == "messages":
            ids, prefix_len = chat_prompt(record["messages"], self.tokenizer)
        elif prompt == "prompt_ids":
            ids = token_prompt(record["prompt_ids"], self.config)
        else:
            ids = text_prompt(record["prompt"], self.tokenizer)
            if not text.endswith("_ids"):
                assert self.tokenizer is not None
                ids, texts = cut(record["prompt"], words, self.tokenizer)
        for number, tokens in enumerate(texts):
            if not tokens:
                place = f" (choice {number})" if len(texts) > 1 else ""
                raise BadRequest(f"{text!r} has no tokens{place}")
        explicit = integer(record, "prefix_len", 0, len(ids) + 1)
        seed, greedy = integer(record, "seed", 0, SEED_LIMIT), flag(record, "greedy")
        return self.checked(
            ScoreRequest(
                id=name,
                prompt_ids=ids,
                texts=tuple(texts),
                sizes=sizes,
                prefix_len=prefix_len if explicit is None else explicit,
                prefix_from_messages=explicit is None and prefix_len is not None,
                seed=self.seed if seed is None else seed,
                greedy=self.estimate.greedy if greedy is None else greedy,
                index=index,
            )
        )

    def checked(self, request: ScoreRequest) -> ScoreRequest:
        """A request as it is run.

        Raises:
            BadRequest: it is too long for the model or the method, its tokens are not the model's, or it has none.
        """
        longest = max(map(len, request.texts), default=0)
        if not request.prompt_ids or not all(request.texts) or not longest:
            raise BadRequest(f"{'a text' if request.prompt_ids else 'the prompt'} has no tokens")
        if request.prefix_len is not None and not 0 <= request.prefix_len <= len(request.prompt_ids):
            raise BadRequest(f"prefix_len must lie in 0..{len(request.prompt_ids)}, got {request.prefix_len}")
        if len(request.prompt_ids) + longest > self.config.max_length:
            raise BadRequest(
                f"{len(request.prompt_ids)} prompt tokens and {longest} of the text exceed the model's"
                f" {self.config.max_length} tokens; shorten one of them"
            )
        for tokens in (request.prompt_ids, *request.texts):
            token_prompt(tokens, self.config, "prompt_ids" if tokens is request.prompt_ids else "texts")
        most, block = self.estimate.longest, self.config.block_length if self.config.block_causal else longest
        if most is not None and min(longest, block) > most:
            raise BadRequest(
                f"method {self.estimate.method!r} lists every set of at most {most} masked tokens, and a"
                f" {'block' if self.config.block_causal else 'text'} here has {min(longest, block)}: take 'monte_carlo'"
            )
        sizes = request.sizes or (None,) * len(request.texts)
        return dataclasses.replace(request, sizes=sizes)

    def _one(self, record: Mapping[str, Any], fields: Sequence[str]) -> str:
        given = [field for field in fields if record.get(field) is not None]
        if len(given) != 1:
            raise BadRequest(
                f"must have exactly one of {', '.join(map(repr, fields))}, has {', '.join(given) or 'none'}"
            )
        return given[0]


def _listed(value: Any, field: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not 1 <= len(value) <= MOST_CHOICES:
        raise BadRequest(f"{field!r} must be a list of 1 to {MOST_CHOICES} texts, got {shown(value)}")
    return value


def admit(asked: Scorable, parser: ScoreParser, *, errors: Errors) -> list[ScoreRequest | Score]:
    """Turns what was asked into requests, and finds every fault before anything runs.

    Args:
        asked: one request or an iterable of them.
        parser: what makes requests of objects.
        errors: `return` puts a score with the error in the place of a faulty request, with its id.

    Returns:
        Requests and errors in order; a request's index is its position.

    Raises:
        TypeError: this is neither a request nor a collection of them; or, with `errors="raise"`, one of them is not.
        ValueError: `errors` is something else.
        BicacheError: with `errors="raise"`, a request is faulty; the message names the first and counts the others.
    """
    one = Mapping | ScoreRequest
    single, entries = entries_of(asked, errors, single=isinstance(asked, one), forms=_FORMS)

    def name_of(entry: Any, number: int) -> str:
        if not isinstance(entry, one):
            raise TypeError(f"a request to score must be {_FORMS}, got {shown(entry)}")
        return entry.id if isinstance(entry, ScoreRequest) else request_name(entry, number)

    def parse(entry: Any, name: str, place: int) -> ScoreRequest:
        if isinstance(entry, ScoreRequest):
            return dataclasses.replace(parser.checked(entry), index=place)
        return parser.parse(entry, name, place)

    return admit_each(entries, errors, single=single, name_of=name_of, parse=parse, fault=_error)


def _error(name: str, message: str) -> Score:
    return Score(name, error=error_result(name, message).error)
