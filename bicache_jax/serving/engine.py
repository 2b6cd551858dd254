"""The engine: requests in, results out, each prefix encoded once.

    requests -> prefixes -> boundaries -> batches -> encode prefix -> intervals -> results

What runs on the device are two programs, `encode` and `decode`; everything here is bookkeeping between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bicache_jax.core.config import ATTENTION, CacheConfig, SamplingConfig
from bicache_jax.core.score import Estimate, Method, Score
from bicache_jax.core.types import BicacheError, Model, Request, Result
from bicache_jax.serving.admission import Asked, Errors, Settings, admit, settings
from bicache_jax.serving.compilation import start_compilation_cache
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.frames import SECONDS, Frames
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.memory import kept_bytes, params_bytes
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.planner import Planner, boundary_rule, cache_for
from bicache_jax.serving.prefix_files import open_files
from bicache_jax.serving.prefixes import Prefixes
from bicache_jax.serving.requests import Parser
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.scheduler import Scheduler, result_of, scheduled
from bicache_jax.serving.score_requests import Scorable, ScoreParser
from bicache_jax.serving.score_requests import admit as admit_scores
from bicache_jax.serving.scoring import Scorer
from bicache_jax.serving.stats import Counters, Stats
from bicache_jax.serving.store import PrefixStore
from bicache_jax.serving.warmup import Warmup, warm_up
from bicache_jax.sharding import check_mesh
from bicache_jax.wiring import backbone_here, device_memory


class Engine:
    """Runs requests on a model.

    A request gets the same tokens wherever its prefix is the same: they do not depend on neighbours, padding, order or
    batch size (with `batch_boundary="min"` they do, through the boundary). The prefix of a request is its own where it
    has one: its `prefix_len`, all messages but the last user message, the whole prompt for several samples, the longest
    prefix added to `prefixes` that its prompt begins with. Where it has none, `CacheConfig.prefix_detection` decides:
    with `auto` it is what the request shares with the other requests of the same call, and another call may give
    another one; with `messages` or `off` there is none, and so a request gets the same tokens alone and in any call.
    """

    def __init__(
        self,
        model: Model,
        *,
        cache: CacheConfig | None = None,
        sampling: SamplingConfig | None = None,
        batch_size: int | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
        prefix_cache_bytes: int | None = None,
        prefix_cache_dir: str | Path | None = None,
        prefix_host_bytes: int = 0,
        namespace: str = "",
    ) -> None:
        """Makes an engine.

        The first one of a process starts the persistent compilation cache (`bicache_jax.use_compilation_cache`).

        Args:
            model: from `load_model`.
            cache: how prefixes are reused; the default is BiCache with the model's own boundary table.
            sampling: how canvases are denoised, unless a call or a request says otherwise.
            batch_size: most rows of a batch (on a mesh: of each data shard's); None: planned from the shapes.
            attention: implementation of prefix attention (see `bicache_jax.kernels.prefix_attention`).
            mesh: mesh `("data", "model")` to run on (`bicache_jax.sharding.make_mesh`); None: the default device. A
                model that was not loaded onto it is cut here.
            prefix_cache_bytes: bytes on a device in which encoded prefixes are kept from call to call; 0 keeps none;
                None: a sixteenth of the device's memory or what the model leaves of it, 256 MiB where the platform does
                not say how much there is. It changes no result.
            prefix_host_bytes: bytes of the host's memory, for each device, in which those are kept that have no room
                there (pinned memory on accelerators); of use where copying one back is faster than encoding it anew.
            prefix_cache_dir: folder in which they also outlive the process, and other processes find them.
            namespace: encodings in that folder are only used by engines of the same namespace (`generate` has one
                for each call within it).

        Raises:
            TypeError: an argument is of another type.
            BicacheError: there is no boundary table for the model, the boundary is deeper than the model, the
                implementation of attention does not run here, the mesh has other axes, or `prefix_cache_dir` cannot be
                written, or goes with a mesh or a model without a fingerprint.
        """
        _check_types(
            model, cache, sampling, batch_size, attention, mesh, prefix_cache_bytes, prefix_host_bytes, namespace
        )
        if batch_size is not None and batch_size < 1:
            raise BicacheError(f"batch_size must be >= 1, got {batch_size}")
        for name, nbytes in (("prefix_cache_bytes", prefix_cache_bytes), ("prefix_host_bytes", prefix_host_bytes)):
            if nbytes is not None and nbytes < 0:
                raise BicacheError(f"{name} must be >= 0, got {nbytes}")
        start_compilation_cache()
        self.model: Model = model
        self.cache: CacheConfig = cache_for(model, cache or CacheConfig())
        self.sampling: SamplingConfig = sampling or SamplingConfig()
        self.batch_size = batch_size
        placement = Placement(model.config, None if mesh is None else check_mesh(mesh))
        backbone = backbone_here(
            placement.partition.local, attention, devices=placement.devices, axis=placement.axis, make=model.backbone
        )
        params = placement.params(model.params, backbone.axes)
        self._counters = Counters()
        self._executor = Executor(model, self.cache, placement, backbone, params, self._counters)
        if prefix_cache_bytes is None:
            # Processes that share a mesh must keep the same, though their devices may report other sizes.
            alone = len({device.process_index for device in placement.devices}) == 1
            prefix_cache_bytes = kept_bytes(device_memory(placement.devices) if alone else None, params_bytes(params))
        files = None
        if prefix_cache_dir is not None:
            files = open_files(
                prefix_cache_dir,
                model,
                placement,
                attention=backbone.attention,
                namespace=namespace,
                cache_dtype=self.cache.cache_dtype,
            )
        block = model.config.block_length if model.config.block_causal else 1
        self._store = PrefixStore(prefix_cache_bytes, files, prefix_host_bytes, block)
        self._prefixes = Prefixes(self._store, model.config, model.tokenizer)
        self._planner = Planner(
            placement,
            self.cache,
            boundary_rule(model, self.cache),
            jnp.dtype(model.dtype),
            params_bytes(params),
            batch_size,
        )

    def __repr__(self) -> str:
        return f"Engine({self.model!r}, policy={self.cache.policy!r}, batch_size={self.batch_size})"

    @property
    def prefixes(self) -> Prefixes:
        """The prefixes that are kept from call to call, and those that were added."""
        return self._prefixes

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        return self._counters.stats

    def generate(
        self,
        requests: Asked,
        *,
        sampling: Settings = None,
        errors: Errors = "raise",
        progress: bool = False,
        namespace: str = "",
    ) -> list[Result]:
        """Answers requests.

        Args:
            requests: one request or an iterable of them, in any mixture: a text, a conversation (a list of messages), a
                list of token ids, a dict as in a request file (`bicache generate --help`), a `Request`. A `Result`
                passes through.
            sampling: decoding settings of this call in place of the engine's: a `SamplingConfig`, or a dict of the
                fields that differ. What a request says itself comes first, and a `Request` says everything.
            errors: what becomes of faulty requests. `raise`: an exception, before anything runs. `return`: each has an
                error as its result, with its id, and the others run.
            progress: show a bar over finished results.
            namespace: encodings are shared with calls of the same namespace only. It is the operator's to choose, not
                part of a request, and changes no result.

        Returns:
            Results in the order of the requests, samples of a request in order; a list for a single request, too.

        Raises:
            TypeError: something is not a request, or not settings.
            ValueError: settings that do not go together.
            BicacheError: a request is faulty: an unknown key, a bad value, a prompt too long for the model. The message
                names its place.
        """
        entries, rows = self.admitted(requests, sampling, errors, namespace)
        found = []
        with _bar(entries, shown=progress) as bar:
            for answer in self._answer(entries, rows):
                found.append(answer)
                bar.update()
        return [result for _, _, result in sorted(found, key=lambda answer: answer[:2])]

    def chat(self, messages: Asked, *, sampling: Settings = None) -> Result:
        """Answers a conversation.

        Its shapes come in few sizes, so that most turns of one that grows find their programs compiled.

        Args:
            messages: its messages, `{"role", "content"}` each; a text is one message of the user.
            sampling: as in `generate`.

        Raises:
            TypeError: these are no messages.
            BicacheError: a message is faulty, or the model has no tokenizer or no chat template.
        """
        entries, rows = self.admitted(self.conversation(messages), sampling, "raise")
        [(_, _, result)] = self._answer(entries, rows, growing=True)
        return result

    def stream(
        self,
        requests: Asked,
        *,
        sampling: Settings = None,
        errors: Errors = "raise",
        partial: bool = True,
        every: int | None = None,
        frame_seconds: float = SECONDS,
        namespace: str = "",
    ) -> Iterator[Result]:
        """Answers requests as they finish.

        Args:
            requests: as in `generate`; faulty ones raise when this is called.
            sampling: as in `generate`.
            errors: as in `generate`.
            partial: show every row while it is denoised too, its canvas as it is (mask tokens where it is undecided)
                and `finish_reason` None. How often never changes a token.
            every: denoising steps between two such looks; None: as many as take about `frame_seconds`.
            frame_seconds: seconds between them.
            namespace: as in `generate`.

        Returns:
            An iterator of results, errors first, then in the order of completion.

        Raises:
            TypeError: as in `generate`; or `every` is not an integer.
            ValueError: as in `generate`; or `every` is below 1.
            BicacheError: as in `generate`.
        """
        entries, rows = self.admitted(requests, sampling, errors, namespace)
        frames = Frames(every, seconds=frame_seconds) if partial else None
        return (result for _, _, result in self._answer(entries, rows, frames))

    def score(
        self,
        requests: Scorable,
        *,
        method: Method = "monte_carlo",
        samples: int = 128,
        batch: int = 16,
        greedy: bool = False,
        errors: Errors = "raise",
        progress: bool = False,
        namespace: str = "",
    ) -> list[Score]:
        """Says how likely texts are behind prompts.

        A request is a dict with one of `prompt`, `messages` and `prompt_ids`, and one of `continuation` (a text),
        `choices` (several), `continuation_ids` and `choices_ids`; optionally `id`, `prefix_len` and `seed`. Prefixes
        are found, encoded, kept and reused as in `generate`; where a request has none, its whole prompt is one, which
        its choices and samples share. Samples that stand for the steps of a refresh interval share a refresh. Under
        block-causal attention a text is scored block by block, each behind the true ones before it, which is exact;
        within a block `method` says how. A score depends on the request and its prefix, never on its company.

        Args:
            requests: one request or an iterable of them.
            method: `monte_carlo`: LLaDA's estimate of the bound on the log-likelihood (arXiv 2502.09992, equation 14;
                `get_log_likelihood` of its repository). `pseudo`: the sum of log-probabilities where all tokens are
                masked, in one pass. `exact`: the bound itself, over every set of masked tokens, for texts, or blocks,
                of at most 10.
            samples: samples of a Monte Carlo estimate. Equal masks are looked at once, so a text of one token takes one
                pass.
            batch: samples among which the numbers of masked tokens are spread evenly; `samples` is a multiple.
            greedy: also decode each prompt at temperature 0, a token a step, and say whether that gives the text.
            errors: what becomes of faulty requests, as in `generate`.
            progress: show a bar over finished requests.
            namespace: as in `generate`.

        Returns:
            Scores in the order of the requests; a list for a single request, too.

        Raises:
            TypeError: something is not a request, or an argument is of another type.
            ValueError: an argument is out of range.
            BicacheError: a request is faulty; the message names its place.
        """
        estimate = Estimate(method, samples, batch, greedy)
        entries = admit_scores(requests, self.score_parser(estimate), errors=errors)
        return self.scorer(estimate, namespace).answers(entries, progress=progress)

    def plan(self, requests: Asked, *, sampling: Settings = None, errors: Errors = "raise") -> Plan:
        """What `generate` would do with the same arguments; nothing is run. Raises what that raises."""
        return self._planner.plan(self.admitted(requests, sampling, errors)[1], self._store)

    def warmup(
        self,
        requests: Asked | None = None,
        *,
        prompt_len: int | None = None,
        prefix_len: int = 0,
        gen_length: int | None = None,
        rows: int = 1,
        sampling: Settings = None,
    ) -> Warmup:
        """Compiles the programs that a `generate` of these requests, or of requests of this shape, will need.

        Prefixes are encoded and no denoising step is made. Which programs a run needs follows from its shapes in
        buckets and from its boundaries, so a run of another mixture may compile more.

        Args:
            requests: as in `generate`; excludes the following.
            prompt_len: tokens of a prompt, prefix included.
            prefix_len: tokens of the prefix, which the rows share.
            gen_length: response tokens (default: the engine's).
            rows: rows that run together.
            sampling: as in `generate`.

        Returns:
            What was compiled, and how long that took.

        Raises:
            TypeError: as in `generate`.
            ValueError: both requests and a `prompt_len` are given, or neither; or as in `generate`.
            BicacheError: as in `generate`.
        """
        if (requests is None) == (prompt_len is None):
            raise ValueError("warmup takes either requests or a prompt_len")
        if prompt_len is not None:
            length: dict[str, Any] = {} if gen_length is None else {"gen_length": gen_length}
            shape = {"prompt_ids": [0] * prompt_len, "prefix_len": prefix_len, "n": rows, **length}
        plan = self.plan(shape if requests is None else requests, sampling=sampling)
        return warm_up(self._executor, plan, PrefixStore(0) if requests is None else self._store)

    def update_params(self, params: Any) -> None:
        """Uses other weights of the same model from the next call on, as a training loop makes them.

        All encodings are forgotten, and nothing is kept on disk any more. A stream that has begun ends with its own.

        Args:
            params: as `Model.params`: the same tree, shapes and dtypes.

        Raises:
            ValueError: something about them differs.
        """
        trees: list[Any] = [jax.tree.structure(tree) for tree in (self.model.params, params)]
        mine, theirs = jax.tree.leaves(self.model.params), jax.tree.leaves(params)
        if trees[0] != trees[1] or any(
            (a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(mine, theirs, strict=True)
        ):
            raise ValueError("params must have the tree, shapes and dtypes of the model's own")
        self.model = dataclasses.replace(self.model, params=params, fingerprint="")
        executor = self._executor
        placed = executor.placement.params(params, executor.backbone.axes)
        self._executor = dataclasses.replace(executor, model=self.model, params=placed)
        self._store = self._store.renewed()
        self._prefixes.use(self._store)

    def parser(self, sampling: Settings = None) -> Parser:
        """What makes requests of objects; `sampling` as in `generate`."""
        return Parser(self.model.config, self.model.tokenizer, settings(sampling, self.sampling), self.cache)

    def score_parser(self, estimate: Estimate) -> ScoreParser:
        """What makes requests to score of objects."""
        return ScoreParser(self.model.config, self.model.tokenizer, self.sampling.seed, estimate)

    def scorer(self, estimate: Estimate, namespace: str = "") -> Scorer:
        """What scores parsed requests.

        Raises:
            TypeError: the namespace is not a string.
        """
        _check_namespace(namespace)
        return Scorer(self._executor, self._planner, self._store, self._prefixes.added, namespace, estimate)

    def conversation(self, messages: Asked) -> dict[str, Any]:
        """A conversation as one request; errors as in `chat`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if isinstance(messages, Mapping | bytes) or not isinstance(messages, Sequence):
            raise TypeError(f"messages must be a list of {{'role', 'content'}}, got {type(messages).__name__}")
        return {"messages": messages}

    @property
    def executor(self) -> Executor:
        """The model on its devices; another one after `update_params`."""
        return self._executor

    def admitted(
        self, asked: Asked, sampling: Settings, errors: Errors, namespace: str = ""
    ) -> tuple[list[Request | Result], list[Row]]:
        """Requests, or errors in their places, and the rows that the former make; raises what `generate` does."""
        _check_namespace(namespace)
        entries = admit(asked, self.parser(sampling), errors=errors)
        requests = [one for one in entries if isinstance(one, Request)]
        return entries, self._planner.rows(requests, self._prefixes.added, namespace)

    def open_scheduler(self, lanes: int, patience: float) -> tuple[Scheduler, RunPrefixes]:
        """A scheduler without an end, and its prefixes, which are to be closed."""
        plan, places = self._planner.endless(self._store, lanes)
        prefixes = RunPrefixes(plan, self._store)
        return Scheduler(self._executor, plan, prefixes, places, lanes=lanes, patience=patience), prefixes

    def _answer(
        self,
        entries: Sequence[Request | Result],
        rows: Sequence[Row],
        frames: Frames | None = None,
        *,
        growing: bool = False,
    ) -> Iterator[tuple[int, int, Result]]:
        """Yields (place, sample, result)."""
        for place, entry in enumerate(entries):
            if isinstance(entry, Result):
                yield place, entry.sample, entry
        places = {id(entry): place for place, entry in enumerate(entries)}
        plan = self._planner.plan(rows, self._store, growing=growing)
        executor, prefixes = self._executor, RunPrefixes(plan, self._store)  # a run keeps the weights it began with
        try:
            for seen in scheduled(executor, plan, prefixes).run(frames):
                if (result := result_of(executor, seen)) is not None:
                    yield places[id(seen.row.request)], seen.row.sample, result
        finally:
            prefixes.close()


def _check_namespace(namespace: Any) -> None:
    if not isinstance(namespace, str):
        raise TypeError(f"namespace must be a string, got {type(namespace).__name__} {namespace!r:.60}")


def _bar(entries: Sequence[Request | Result], *, shown: bool) -> AbstractContextManager[Any]:
    """A progress bar over results."""
    from tqdm.auto import tqdm

    total = sum(entry.n if isinstance(entry, Request) else 1 for entry in entries)
    return tqdm(total=total, unit="result", disable=not shown)


def _check_types(
    model: Any,
    cache: Any,
    sampling: Any,
    batch_size: Any,
    attention: Any,
    mesh: Any,
    prefix_cache_bytes: Any,
    prefix_host_bytes: Any,
    namespace: Any,
) -> None:
    """Says which argument of an engine is of a wrong type, and what to give.

    Raises:
        TypeError: one is.
    """
    if isinstance(model, str | Path):
        raise TypeError(f"model must be a loaded Model, got the path {str(model)!r}: bicache_jax.load_model reads it")
    wanted = (
        ("model", model, Model, "a Model, from bicache_jax.load_model"),
        ("cache", cache, CacheConfig | None, "a CacheConfig"),
        ("sampling", sampling, SamplingConfig | None, "a SamplingConfig"),
        ("batch_size", batch_size, int | None, "an integer"),
        ("attention", attention, str, f"one of {', '.join(ATTENTION)}"),
        ("namespace", namespace, str, "a string"),
        ("prefix_cache_bytes", prefix_cache_bytes, int | None, "an integer"),
        ("prefix_host_bytes", prefix_host_bytes, int, "an integer"),
        ("mesh", mesh, Mesh | None, "a jax.sharding.Mesh, from bicache_jax.sharding.make_mesh"),
    )
    for name, value, kinds, words in wanted:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{name} must be {words}, got {type(value).__name__} {value!r:.60}")
