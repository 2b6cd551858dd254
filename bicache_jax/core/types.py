"""What goes in and what comes out: requests, results, and the model they are for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from bicache_jax.core.config import ModelConfig, SamplingConfig

if TYPE_CHECKING:  # the command's --help reads this file and need not wait for jax
    from bicache_jax.core.backbone import MakeBackbone

FinishReason = Literal["stop", "length", "error"]
Record = dict[str, Any]
"""A result as a JSON object."""
Key = tuple[str, int]
"""What tells results apart: id of the request and number of the sample."""


HOLE = "\u2591"
"""Stands for a masked position in the text of a canvas that is not finished."""


class BicacheError(Exception):
    """A fault of the input that one line can explain; the command prints it without a traceback and exits 2."""


@runtime_checkable
class Tokenizer(Protocol):
    """What requests and results ask of a checkpoint's tokenizer (`bicache_jax.checkpoints.tokenizer`)."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, with the tokens that the tokenizer puts around every text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...

    def canvas(self, ids: Sequence[int], mask_id: int) -> str:
        """Text of a canvas that is not finished, a `HOLE` for each masked position."""
        ...

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> tuple[int, ...]:
        """Token ids of a conversation.

        Args:
            messages: the conversation.
            generate: end with the opening of the assistant's answer.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, tokenised: a prompt with a response behind it, or a template with holes in it.

    Attributes:
        id: name of the request; part of the noise key, so that a result never depends on its neighbours.
        prompt_ids: the whole prompt, prefix included; of a template its known tokens, in order, without the holes.
        prefix_len: tokens of the prompt that are its shared prefix; None: to be found (`CacheConfig.prefix_detection`).
        sampling: all decoding settings of this request (`sampling.seed` is the seed of sample 0).
        n: samples asked for; sample i uses seed + i.
        index: place in the input, from 0; results are returned in this order.
        stop: strings that end the text; the first one found and what follows it are left out.
        max_tokens: tokens of the response that may be text, where the canvas is longer; None: all of them.
        chat: whether the prompt is a conversation.
        prefix_from_messages: whether `prefix_len` follows from the conversation rather than being given.
        holes: of a template, first position and length of each hole, positions counted over the whole filled sequence;
            `sampling.gen_length` becomes their sum. Empty: the response is the one hole, behind the prompt.
        trim: whether a hole's text ends at an end of text.
        template: texts of a template in front of, between and behind its holes, which the filled text repeats as they
            are; empty if it came as tokens.
    """

    id: str
    prompt_ids: tuple[int, ...]
    prefix_len: int | None = None
    sampling: SamplingConfig = SamplingConfig()
    n: int = 1
    index: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    chat: bool = False
    prefix_from_messages: bool = False
    holes: tuple[tuple[int, int], ...] = ()
    trim: bool = False
    template: tuple[str, ...] = ()

    @property
    def lead(self) -> int:
        """Tokens of the prompt in front of the first masked position: all that a prefix may have."""
        return self.holes[0][0] if self.holes else len(self.prompt_ids)

    def canvas(self, mask_id: int) -> tuple[int, ...]:
        """The whole sequence, prompt and response, before anything is decoded."""
        known, found = iter(self.prompt_ids), list[int]()
        for place, length in self.holes or ((len(self.prompt_ids), self.sampling.gen_length),):
            found += [*itertools.islice(known, place - len(found)), *(mask_id,) * length]
        return (*found, *known)

    def __post_init__(self) -> None:
        if isinstance(self.prompt_ids, str | bytes):
            raise TypeError('prompt_ids must be token ids, got text: a prompt in words is {"prompt": text}')
        if not isinstance(self.id, str):
            raise TypeError(f"id must be a string, got {self.id!r:.80}")
        if not isinstance(self.sampling, SamplingConfig):
            raise TypeError(f"sampling must be a SamplingConfig, got {self.sampling!r:.80}")
        if not isinstance(self.prompt_ids, tuple):  # lists and arrays have no hash
            object.__setattr__(self, "prompt_ids", tuple(map(int, self.prompt_ids)))
        if not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.holes:
            try:
                holes = tuple((int(place), int(length)) for place, length in self.holes)
            except (TypeError, ValueError):
                raise TypeError(f"holes must be pairs of position and length, got {self.holes!r:.80}") from None
            sampling = dataclasses.replace(self.sampling, gen_length=max(1, sum(length for _, length in holes)))
            object.__setattr__(self, "holes", holes)
            object.__setattr__(self, "sampling", sampling)


@dataclasses.dataclass(frozen=True)
class Filled:
    """What a hole of a template was filled with.

    Attributes:
        token_ids: all its tokens.
        text: the text that they add to what stands in front of them, up to a stop string or, with `trim`, to an end of
            text; None without a tokenizer.
    """

    token_ids: tuple[int, ...]
    text: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """One response, or the reason why there is none.

    Attributes:
        id: id of the request.
        sample: number of the sample, 0..n-1.
        token_ids: the whole response canvas [gen_length], masks included where a stream shows it unfinished. Of a
            template all from its first hole to its end, known tokens included.
        text: decoded up to the end of text or a stop string, a hole for each masked position; None without a
            tokenizer. Of a template the whole of it, filled.
        finish_reason: `stop` (the response holds an end-of-text token or a stop string), `length`, or `error`; None
            while unfinished.
        prefix_len: P, prompt tokens served from the prefix cache.
        prefix_ratio: r = round(100 P / (P + U)).
        boundary: b used for the request.
        refresh_interval: N used for the request.
        steps: denoising steps made.
        forward_passes: forward passes made for the row, the encoding of its prefix not counted.
        error: what is wrong with the request, one line; None if all is well.
        masked: positions of the canvas that are still undecided, in a stream's unfinished results.
        prompt_len: tokens of the prompt, prefix included.
        text_len: tokens of the canvas that `text` is made of.
        chat: whether the request is a conversation.
        engine_fault: whether an error is not the request's own: the model could not answer it.
        holes: of a template, what its holes were filled with, in order.
        cached_tokens: prompt tokens whose encoding was there already, made for another request or in an earlier call.
            It says what happened, not what the answer is: neither `==` nor files of results look at it.
    """

    id: str
    sample: int = 0
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    finish_reason: FinishReason | None = "length"
    prefix_len: int = 0
    prefix_ratio: int = 0
    boundary: int = 0
    refresh_interval: int = 0
    steps: int = 0
    forward_passes: int = 0
    error: str | None = None
    masked: tuple[int, ...] = ()
    prompt_len: int = 0
    text_len: int = 0
    chat: bool = False
    engine_fault: bool = False
    holes: tuple[Filled, ...] = ()
    cached_tokens: int = dataclasses.field(default=0, compare=False)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Result(id={self.id!r}, error={_short(self.error, 200)!r})"
        shown = [f"id={self.id!r}", f"sample={self.sample}", f"finish_reason={self.finish_reason!r}"]
        shown += [] if self.text is None else [f"text={_short(self.text, 80)!r}"]
        counts = ("prefix_len", "prefix_ratio", "boundary", "steps", "forward_passes")
        shown += [f"tokens={len(self.token_ids)}", *(f"{name}={getattr(self, name)}" for name in counts)]
        return f"Result({', '.join(shown)})"

    @property
    def decoded(self) -> tuple[int, ...]:
        """The tokens that were decoded: the response, or those of all holes one after the other."""
        return tuple(token for hole in self.holes for token in hole.token_ids) or self.token_ids

    def to_json(self) -> Record:
        """The result as a JSON object, as files have it.

        There is an `error` only where there is one, `holes` only of a template, and `masked` while it is unfinished.
        """
        return native(self.to_record())

    def to_record(self) -> Record:
        """The result as journals keep it, with what other formats need."""
        record = dataclasses.asdict(self)
        record["token_ids"] = list(self.token_ids)
        holes = record.pop("holes")
        if holes:
            record["holes"] = [{**hole, "token_ids": list(hole["token_ids"])} for hole in holes]
        del record["cached_tokens"]
        if self.error is None:
            del record["error"]
        for name in ("chat", "engine_fault"):
            if not record[name]:
                del record[name]
        masked = record.pop("masked")
        if self.finish_reason is None:
            record["masked"] = list(masked)
        return record


_NOTES = ("prompt_len", "text_len", "chat", "engine_fault", "created")


def native(record: Record) -> Record:
    """A record in our own format of results."""
    return {name: value for name, value in record.items() if name not in _NOTES}


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint. Two models are equal only if they are the same object: parameters are arrays.

    Attributes:
        config: its architecture.
        params: parameter pytree, layer parameters stacked `[L, ...]`.
        tokenizer: the checkpoint's tokenizer, or None.
        fingerprint: hash of config, safetensors headers and norm tensors, and the format of weights in 8 bits
            (`...+w8`); a boundary table names the one it is for.
        name: what the user called the model.
        boundaries: the boundary table `{r: b}` that belongs to the model; None if there is none.
        note: where that table comes from, if that is not the model itself.
        backbone: makes its backbone, for an architecture of your own (`bicache_jax.core.backbone`); None: its family
            does (`bicache_jax.register_family`).
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    fingerprint: str = ""
    name: str = ""
    boundaries: Mapping[int, int] | None = None
    note: str = ""
    backbone: MakeBackbone | None = None

    @property
    def dtype(self) -> Any:
        """Dtype of activations and caches (`bicache_jax.core.numerics.activation_dtype`)."""
        from bicache_jax.core.numerics import activation_dtype

        return activation_dtype(self.params)

    @property
    def checkpoint(self) -> str:
        """The fingerprint of the checkpoint, whatever format its weights are in here."""
        return self.fingerprint.partition("+")[0]

    def __repr__(self) -> str:
        import jax  # already imported by what made the parameters

        config, leaves = self.config, jax.tree.leaves(self.params)
        sizes = sum(leaf.size for leaf in leaves)
        dtypes = sorted({str(leaf.dtype) for leaf in leaves})
        tokenizer = "no tokenizer" if self.tokenizer is None else "tokenizer"
        return (
            f"Model({self.name!r}, {config.num_layers} layers of {config.d_model},"
            f" {sizes:,} parameters, {'/'.join(dtypes)}, {tokenizer})"
        )
