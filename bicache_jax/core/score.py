"""Likelihoods: what `Engine.score` gives for a text behind a prompt, and for the choices of a question."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bicache_jax.core.types import Record

if TYPE_CHECKING:  # the command's --help reads this file and need not wait for NumPy
    from bicache_jax.core.masks import Masks

Method = Literal["monte_carlo", "pseudo", "exact"]
METHODS: tuple[Method, ...] = ("monte_carlo", "pseudo", "exact")
"""How a log-likelihood is estimated.

`monte_carlo`: LLaDA's estimate of its bound, from samples of masked tokens. `pseudo`: all tokens masked, in one pass.
`exact`: the bound itself, from every set of masked tokens, for texts (or blocks) of few tokens.
"""
Norm = Literal["none", "token", "byte"]
NORMS: tuple[Norm, ...] = ("none", "token", "byte")
"""What a log-likelihood is divided by where choices of different lengths are compared."""

MOST_SAMPLES = 2**16
MOST_LISTED = 10
"""Tokens of which every set is listed, at most: 1023 sets."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How log-likelihoods are estimated.

    Attributes:
        method: as in `bicache_jax.core.score.METHODS`.
        samples: samples of a Monte Carlo estimate.
        batch: samples whose numbers of masked tokens are spread evenly; at most `samples`.
        greedy: whether to say if greedy decoding gives the text.
    """

    method: Method = "monte_carlo"
    samples: int = 128
    batch: int = 16
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("samples", "batch"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r:.80}")
            if not 1 <= int(value) <= MOST_SAMPLES:
                raise ValueError(f"{name} must be from 1 to {MOST_SAMPLES}, got {value}")
            object.__setattr__(self, name, int(value))
        if self.samples % self.in_batch:
            raise ValueError(f"samples must be a multiple of batch, got {self.samples} and {self.batch}")

    @property
    def longest(self) -> int | None:
        """Tokens of a text, or block, that the method can take; None: any."""
        return MOST_LISTED if self.method == "exact" else None

    @property
    def in_batch(self) -> int:
        """Samples of a batch."""
        return min(self.batch, self.samples)

    def masks(self, words: Sequence[int], length: int) -> Masks:
        """The masks of a text; `words` is what they are drawn from."""
        from bicache_jax.core.masks import at_once, every, monte_carlo

        if self.method == "monte_carlo":
            return monte_carlo(words, length, self.samples, self.in_batch)
        return every(length) if self.method == "exact" else at_once(length)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a text is behind its prompt.

    Attributes:
        log_likelihood: natural logarithm of its probability, or the bound of it.
        tokens: its tokens.
        bytes: its bytes in UTF-8; None where it was given as tokens.
        standard_error: of the estimate, from its batches, which are independent; None where there are not two of them
            (`pseudo` has one look), 0 with `exact`, which looks at every set of masks.
        passes: passes over its tokens; equal masks are looked at once.
        greedy: whether decoding at temperature 0, a token a step, gives this very text; None if that was not asked.
    """

    log_likelihood: float
    tokens: int
    bytes: int | None = None
    standard_error: float | None = None
    passes: int = 0
    greedy: bool | None = None

    def per(self, norm: Norm) -> float:
        """The log-likelihood, per token or per byte where asked for.

        Raises:
            ValueError: there is no such norm, or bytes are not known.
        """
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if norm == "byte" and self.bytes is None:
            raise ValueError("the texts were given as tokens, so their bytes are not known: norm 'token' or 'none'")
        size = {"none": 1, "token": self.tokens, "byte": self.bytes}[norm]
        return self.log_likelihood / max(1, size or 0)


@dataclasses.dataclass(frozen=True)
class Score:
    """The likelihoods of a request's continuation, or of its choices.

    Attributes:
        id: id of the request.
        choices: one for each text, in the order of the request; none where there is an error.
        prompt_len: tokens of the prompt, prefix included.
        prefix_len: P, prompt tokens served from the prefix cache.
        prefix_ratio: r = round(100 P / (P + U)), U with the longest text.
        boundary: b used for the request.
        error: what is wrong with the request, one line; None if all is well.
        engine_fault: whether an error is not the request's own: the model could not answer it.
        cached_tokens: prompt tokens whose encoding was there already. It says what happened, not what the answer is:
            `==` does not look at it, nor do files.
    """

    id: str
    choices: tuple[Likelihood, ...] = ()
    prompt_len: int = 0
    prefix_len: int = 0
    prefix_ratio: int = 0
    boundary: int = 0
    error: str | None = None
    engine_fault: bool = False
    cached_tokens: int = dataclasses.field(default=0, compare=False)

    def best(self, norm: Norm = "none") -> int:
        """Which choice is most likely, the first among equals.

        Raises:
            ValueError: as in `Likelihood.per`; or there is none.
        """
        values = [choice.per(norm) for choice in self.choices]
        return values.index(max(values))

    @property
    def label(self) -> int:
        """The most likely choice; 0 where there is one text."""
        return self.best()

    @property
    def log_likelihood(self) -> float:
        """Log-likelihood of the text, or of the most likely choice."""
        return self.choices[self.label].log_likelihood

    @property
    def standard_error(self) -> float | None:
        """Its standard error."""
        return self.choices[self.label].standard_error

    def to_record(self) -> Record:
        """The score as journals keep it, with the fields of every result."""
        reason = "scored" if self.error is None else "error"
        return {**self.to_json(), "sample": 0, "finish_reason": reason}

    def to_json(self) -> Record:
        """The score as a JSON object, as files have it; `error` only where there is one."""
        record: Record = {"id": self.id}
        if self.error is not None:
            return {**record, "error": self.error}
        choices = [
            {name: value for name, value in dataclasses.asdict(choice).items() if name != "greedy" or value is not None}
            for choice in self.choices
        ]
        return {
            **record,
            "log_likelihood": self.log_likelihood,
            "label": self.label,
            "choices": choices,
            **{name: getattr(self, name) for name in ("prompt_len", "prefix_len", "prefix_ratio", "boundary")},
        }
