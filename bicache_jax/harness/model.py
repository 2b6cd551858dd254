"""The model that lm-evaluation-harness asks: an engine behind its interface `lm_eval.api.model.LM`."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from tqdm import tqdm

from bicache_jax.bulk.journal import Journal
from bicache_jax.core.score import Estimate
from bicache_jax.core.types import BicacheError, Record, Request
from bicache_jax.harness.asked import cut_at, name_of, settings_of, stops_of, windows
from bicache_jax.serving.fields import BadRequest
from bicache_jax.serving.score_requests import ScoreRequest, cut
from bicache_jax.serving.session import Session

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A tokenizer with or without the special tokens around a text: a chat template has put them there."""

    tokenizer: Any
    special: bool

    def encode(self, text: str) -> tuple[int, ...]:
        ids: tuple[int, ...] = self.tokenizer.encode(text, special=self.special)
        return ids


class BicacheLM(LM):
    """Answers the harness's requests with a session.

    All requests of a kind come in one call, so that prefixes are what the items of a task share: its few-shot
    examples are encoded once.
    """

    def __init__(
        self,
        session: Session,
        *,
        name: str,
        estimate: Estimate | None = None,
        gen_length: int | None = None,
        max_length: int | None = None,
        journal: Path | None = None,
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> None:
        """Nothing is asked yet.

        Args:
            session: the model and its settings.
            name: what the model is called.
            estimate: how likelihoods are estimated; None: `Estimate()`.
            gen_length: response tokens, whatever a task asks for; None: what it asks for.
            max_length: most tokens of prompt and response; None: the model's.
            journal: file that keeps what was answered until the run is over; None: none.
            run: what decides the requests, by the names the user knows; a journal is continued with the same only.
            resume: continue the journal that is there.
            overwrite: drop it.
            quiet: show no bars.

        Raises:
            BicacheError: the model has no tokenizer, or the journal is another run's.
        """
        super().__init__()
        engine = session.engine
        if engine.model.tokenizer is None:
            raise BicacheError(f"{name} has no tokenizer files, and the harness asks in words")
        self._session, self._name, self._quiet = session, name, quiet
        self._tokenizer: Any = engine.model.tokenizer
        self._estimate, self._gen_length = estimate or Estimate(), gen_length
        limit = engine.model.config.max_length
        if max_length is not None and not 2 <= max_length <= limit:
            raise BicacheError(f"max_length must be from 2 to the model's {limit}, got {max_length}")
        self._max_length = max_length or limit
        self._templated = False
        self._kept: dict[tuple[str, int], Record] = {}
        self._journal: Journal | None = None
        if journal is not None:
            self._journal = Journal(journal, resume=resume, overwrite=overwrite)
            self._journal.begin({**self._identity(), **(run or {})})
            self._kept = self._journal.finished
        self._call = ""
        self._resumed = 0

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells tokenizers and chat templates apart by."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template; there is one only, whatever name is asked for."""
        template: str | None = self._tokenizer.template
        return template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; one whose last message is to be continued ends with that message.

        Raises:
            BicacheError: the template does not take the conversation, or changes the message that is to be continued.
        """
        self._templated = True
        try:
            text: str = self._tokenizer.chat_text(chat_history, generate=add_generation_prompt)
        except ValueError as error:
            raise BicacheError(str(error)) from None
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        end = text.rfind(last)
        if end < 0:
            raise BicacheError(
                f"{self._name}'s chat template changes the text that its answer is to begin with ({last[:60]!r}), which"
                " a task needs as it is: run that task without --apply-chat-template"
            )
        return text[: end + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the harness's results beside its own settings: ours, and what the caches did."""
        engine = self._session.engine
        return {
            "model_dtype": str(engine.model.dtype),
            "bicache": {
                **self._identity(),
                "resumed": self._resumed,
                "stats": dataclasses.asdict(engine.stats),
                "prefixes": dataclasses.asdict(engine.prefixes.stats),
            },
        }

    def close(self, *, done: bool) -> None:
        """Ends the run; the journal goes where its results are kept elsewhere (`done`), else it stays."""
        if self._journal is not None:
            self._journal.remove() if done else self._journal.close()

    def _identity(self) -> dict[str, Any]:
        """Everything that determines answers besides the requests."""
        return {
            **self._session.settings(),
            "sampling": dataclasses.asdict(self._session.engine.sampling),
            "estimate": dataclasses.asdict(self._estimate),
            "gen_length": self._gen_length,
            "max_length": self._max_length,
        }

    def _recalled(self, requests: Sequence[Request | ScoreRequest]) -> dict[tuple[str, int], Record]:
        """Begins a call; returns what is known of it.

        Prefixes follow from all requests of a call, so an answer that was given among others is not used again.
        """
        self._call = name_of(*(name_of(request.id, request.n, request.prompt_ids) for request in requests))
        found = {key: record for key, record in self._kept.items() if record.get("call") == self._call}
        if self._journal is not None:
            self._resumed += len(found)
            if not found and any((request.id, 0) in self._kept for request in requests):
                _log.warning("%s holds answers that were given among other requests: all is asked", self._journal.path)
        return found

    def _keep(self, record: Record) -> None:
        record = {**record, "call": self._call}
        if self._journal is not None and record["finish_reason"] != "error":
            self._journal.add(record)
        else:
            self._kept[record["id"], record["sample"]] = record

    def _bar(self, what: str, total: int, hidden: bool) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=self._quiet or hidden)

    def _encoder(self, *, bare: bool = False) -> _Encoder:
        return _Encoder(self._tokenizer, special=not (self._templated or bare))

    def _fitting(self, ids: tuple[int, ...], room: int, what: str) -> tuple[int, ...]:
        """A prompt without its first tokens, where it leaves no room for what follows.

        Raises:
            BicacheError: there is no room at all.
        """
        if room < 1:
            raise BicacheError(
                f"{what} of {self._max_length - room} tokens leaves no room: the model has {self._max_length}"
            )
        if len(ids) > room:
            _log.warning("a prompt of %d tokens lost the first %d: %s follows", len(ids), len(ids) - room, what)
        return ids[-room:]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers; a request that comes several times gets as many samples, or one answer at temperature 0."""
        encoder, parser = self._encoder(), self._session.engine.parser()
        asked: dict[str, Request] = {}
        stops: dict[str, list[str]] = {}
        places: list[tuple[str, int]] = []
        seen: Counter[str] = Counter()
        for instance in requests:
            context, arguments = instance.args
            name = name_of("generate_until", context, arguments, self._templated)
            if name not in asked:
                fields = settings_of(arguments, self._gen_length)
                ids = encoder.encode(context) or self._nothing
                ids = self._fitting(ids, self._max_length - fields["gen_length"], "a response")
                try:
                    asked[name] = parser.parse({"prompt_ids": ids, **fields}, name, len(asked))
                except BadRequest as fault:
                    raise BicacheError(f"a request of the harness cannot run: {fault}") from None
                stops[name] = stops_of(arguments)
            sampled = asked[name].sampling.temperature > 0
            places.append((name, seen[name] if sampled else 0))
            seen[name] += 1
            if sampled and seen[name] > 1:
                asked[name] = dataclasses.replace(asked[name], n=seen[name])
        texts: dict[tuple[str, int], str] = {}
        with self._bar("answers", len({*places}), disable_tqdm) as bar:
            known = self._recalled(list(asked.values()))
            bar.update(len(known))
            for record in self._session.stream(list(asked.values()), known, partial=False):
                self._keep(record)
                bar.update()
        for instance, place in zip(requests, places, strict=True):
            record = self._kept.get(place) or self._kept[place[0], 0]
            if record.get("error"):
                raise BicacheError(record["error"])
            texts[place] = cut_at(record["text"] or "", stops[place[0]])
            self.cache_hook.add_partial("generate_until", instance.args, texts[place])
        return [texts[place] for place in places]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods, and whether greedy decoding gives the continuation.

        Continuations of one context in a document are the choices of one request. The second is only looked at where
        there is one continuation, as in LAMBADA, or the estimate asks for it; else it is False. A continuation without
        tokens is certain.
        """
        texts: dict[tuple[Any, ...], dict[str, None]] = {}
        documents = []
        for place, instance in enumerate(requests):
            context, continuation = instance.args
            document = place if instance.doc_id is None else instance.doc_id  # one made by hand belongs to no document
            documents.append((instance.task_name, document, context))
            texts.setdefault(documents[-1], {})[continuation] = None
        asked = {document: self._choices(document[-1], list(words)) for document, words in texts.items()}
        self._score([request for request, _ in asked.values() if request is not None], disable_tqdm)
        found = []
        for instance, document in zip(requests, documents, strict=True):
            request, numbers = asked[document]
            answer = 0.0, True
            if request is not None and instance.args[1] in numbers:
                choice = self._record(request.id)["choices"][numbers[instance.args[1]]]
                answer = choice["log_likelihood"], bool(choice.get("greedy", False))
            self.cache_hook.add_partial("loglikelihood", instance.args, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, window by window."""
        asked: dict[str, list[ScoreRequest]] = {}
        for instance in requests:
            (text,) = instance.args
            if text not in asked:
                ids, name = self._encoder(bare=True).encode(text), name_of("loglikelihood_rolling", text)
                pairs = windows(ids, self._nothing[0], self._max_length)
                asked[text] = [self._request(f"{name}/{at}", context, [own]) for at, (context, own) in enumerate(pairs)]
        self._score([one for parts in asked.values() for one in parts], disable_tqdm)
        found = []
        for instance in requests:
            parts = asked[instance.args[0]]
            total = float(sum(self._record(one.id)["choices"][0]["log_likelihood"] for one in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
            found.append(total)
        return found

    @property
    def _nothing(self) -> tuple[int, ...]:
        """What stands before a text that has nothing before it: the token that ends the text before.

        Raises:
            BicacheError: the model has no such token.
        """
        ends = self._session.engine.model.config.eos_ids
        if not ends:
            raise BicacheError("a request has no context, and the model has no end-of-text token to put there")
        return ends[:1]

    def _choices(self, context: str, texts: Sequence[str]) -> tuple[ScoreRequest | None, dict[str, int]]:
        """The request of a context and what may follow it in a document, and each text's number among its choices.

        Texts without tokens have none; where no text has any, there is no request.
        """
        if context.strip():
            ids, cuts = cut(context, texts, self._encoder())
        else:
            ids, cuts = (), [self._encoder(bare=True).encode(context + text) for text in texts]
        tokens = {text: own for text, own in zip(texts, cuts, strict=True) if own}
        if not tokens:
            return None, {}
        name = name_of("loglikelihood", context, texts, self._templated)
        request = self._request(name, ids or self._nothing, list(tokens.values()))
        request = dataclasses.replace(request, greedy=request.greedy or len(texts) == 1)
        return request, {text: number for number, text in enumerate(tokens)}

    def _request(self, name: str, ids: tuple[int, ...], texts: Sequence[tuple[int, ...]]) -> ScoreRequest:
        ids = self._fitting(ids, self._max_length - max(map(len, texts)), "a text")
        parser = self._session.engine.score_parser(self._estimate)
        request = ScoreRequest(name, ids, tuple(texts), seed=parser.seed, greedy=self._estimate.greedy)
        try:
            return parser.checked(request)
        except BadRequest as fault:
            raise BicacheError(f"a request of the harness cannot run: {fault}") from None

    def _score(self, asked: Iterable[ScoreRequest], hidden: bool) -> None:
        """Scores what the journal has not; documents that ask the same share a request."""
        by_name = {request.id: request for request in asked}
        requests = [dataclasses.replace(request, index=at) for at, request in enumerate(by_name.values())]
        with self._bar("likelihoods", len(requests), hidden) as bar:
            known = self._recalled(requests)
            bar.update(len(known))
            for score in self._session.scores(requests, self._estimate, known):
                self._keep(score.to_record())
                bar.update()

    def _record(self, name: str) -> Mapping[str, Any]:
        record = self._kept[name, 0]
        if record.get("error"):
            raise BicacheError(record["error"])
        return record
