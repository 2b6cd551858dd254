"""`engine.prefixes`: what users say about prefixes that many calls will share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import BicacheError, Tokenizer
from bicache_jax.serving.fields import BadRequest, is_int, shown
from bicache_jax.serving.prompts import chat_prompt, shared_length, text_prompt, token_prompt
from bicache_jax.serving.store import Prefix, PrefixStats, PrefixStore

# Wrong types get a message of ours, so nothing checks these before it.
if TYPE_CHECKING:
    Given: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]
else:
    Given = Any

_ANYTHING = {"role": "user", "content": "?"}


class Prefixes:
    """The prefixes of an engine: those it keeps encoded, and those it has been told of.

    A prefix is given as a text, as messages (the beginning of a conversation, without the last user message), or as
    token ids. Of a text, the prefix is what stays of its tokens when a space or a new line follows.
    """

    def __init__(self, store: PrefixStore, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Made by an engine."""
        self._store, self._config, self._tokenizer = store, config, tokenizer
        self._added: dict[Prefix, None] = {}

    def use(self, store: PrefixStore) -> None:
        """Goes over to another store; for the engine."""
        self._store = store

    def __repr__(self) -> str:
        stats = self.stats
        return (
            f"Prefixes({stats.entries} encoded, {stats.nbytes / 2**20:.1f} of {stats.budget / 2**20:.0f} MiB,"
            f" {len(self._added)} added)"
        )

    def __contains__(self, prefix: Given) -> bool:
        return self._tokens(prefix) in self._store

    @property
    def added(self) -> tuple[Prefix, ...]:
        """The prefixes that were added, as tokens."""
        return tuple(self._added)

    @property
    def stats(self) -> PrefixStats:
        """What is kept, and how often it was found."""
        return self._store.stats

    def add(self, prefix: Given) -> int:
        """Makes this the prefix of requests whose prompt begins with it and that have none of their own.

        Such a request has the longest prefix that was added and that its prompt begins with, alone and in any call. The
        prefix is encoded with the first request that needs it, and then stays (`pin`).

        Returns:
            Its tokens.

        Raises:
            TypeError: it is no text, messages or token ids.
            BicacheError: the model cannot run it.
        """
        tokens = self._tokens(prefix)
        self._added[tokens] = None
        self._store.pin(tokens)
        return len(tokens)

    def pin(self, prefix: Given) -> None:
        """Keeps a prefix, from when it is encoded on, whatever the budget; raises as `add`."""
        self._store.pin(self._tokens(prefix))

    def unpin(self, prefix: Given) -> None:
        """Lets it go when the budget asks for it; raises as `add`."""
        self._store.unpin(self._tokens(prefix))

    def drop(self, prefix: Given) -> None:
        """Forgets a prefix, added or encoded; what runs with it still ends. Raises as `add`."""
        tokens = self._tokens(prefix)
        self._added.pop(tokens, None)
        self._store.unpin(tokens)
        self._store.drop(tokens)

    def clear(self) -> None:
        """Forgets all prefixes."""
        for tokens in list(self._added):
            self._store.unpin(tokens)
        self._added.clear()
        self._store.clear()

    def _tokens(self, prefix: Any) -> Prefix:
        """The tokens of a prefix, as a request's prompt would begin with them."""
        try:
            if isinstance(prefix, str):
                whole, *longer = (text_prompt(prefix + end, self._tokenizer) for end in ("", " a", "\na"))
                tokens = whole[: min(shared_length(whole, other) for other in longer)]
            elif hasattr(prefix, "tolist") or (isinstance(prefix, Sequence) and prefix and all(map(is_int, prefix))):
                tokens = token_prompt(prefix, self._config)
            elif isinstance(prefix, Sequence) and not isinstance(prefix, bytes):
                ids, length = chat_prompt([*prefix, _ANYTHING], self._tokenizer)
                tokens = ids[:length]
            else:
                raise TypeError(f"a prefix must be a text, a list of messages or token ids, got {shown(prefix)}")
            if not tokens:
                raise BadRequest("it has no tokens of its own")
            if len(tokens) >= self._config.max_length:
                raise BadRequest(f"{len(tokens)} tokens leave no room in the model's {self._config.max_length}")
        except BadRequest as fault:
            raise BicacheError(f"prefix: {fault}") from None
        return tokens
