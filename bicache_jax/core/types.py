"""What goes in and what comes out: requests, results, and the model they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from bicache_jax.core.config import ModelConfig, SamplingConfig

FinishReason = Literal["stop", "length", "error"]
Record = dict[str, Any]
"""A result as a JSON object."""
Key = tuple[str, int]
"""What tells results apart: id of the request and number of the sample."""


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
        """Text of a canvas that is not finished, a hole for each masked position."""
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
    """One request, tokenised.

    Attributes:
        id: name of the request; part of the noise key, so that a result never depends on its neighbours.
        prompt_ids: the whole prompt, prefix included.
        prefix_len: tokens of the prompt that are its shared prefix; None: to be found among the other requests.
        sampling: decoding settings of this request (`sampling.seed` is the seed of sample 0).
        n: samples asked for; sample i uses seed + i.
        index: place in the input, from 0; results are returned in this order.
    """

    id: str
    prompt_ids: tuple[int, ...]
    prefix_len: int | None = None
    sampling: SamplingConfig = SamplingConfig()
    n: int = 1
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """One response, or the reason why there is none.

    Attributes:
        id: id of the request.
        sample: number of the sample, 0..n-1.
        token_ids: the whole response canvas [gen_length], masks included where a stream shows it unfinished.
        text: decoded up to the end of text, a hole for each masked position; None without a tokenizer.
        finish_reason: `stop` (an end-of-text token is in the response), `length`, or `error`; None while unfinished.
        prefix_len: P, prompt tokens served from the prefix cache.
        prefix_ratio: r = round(100 P / (P + U)).
        boundary: b used for the request.
        refresh_interval: N used for the request.
        steps: denoising steps made.
        forward_passes: forward passes made for the row, the encoding of its prefix not counted.
        error: what is wrong with the request, one line; None if all is well.
        masked: positions of the canvas that are still undecided, in a stream's unfinished results.
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

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; `error` stands only where there is one, `masked` while it is unfinished."""
        record = dataclasses.asdict(self)
        record["token_ids"] = list(self.token_ids)
        if self.error is None:
            del record["error"]
        masked = record.pop("masked")
        if self.finish_reason is None:
            record["masked"] = list(masked)
        return record


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Attributes:
        config: its architecture.
        params: parameter pytree, layer parameters stacked `[L, ...]`.
        tokenizer: the checkpoint's tokenizer, or None.
        fingerprint: hash of config, safetensors headers and norm tensors; a boundary table names the one it is for.
        name: what the user called the model.
        boundaries: the boundary table `{r: b}` that belongs to the model; None if there is none.
        note: where that table comes from, if that is not the model itself.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    fingerprint: str = ""
    name: str = ""
    boundaries: Mapping[int, int] | None = None
    note: str = ""
