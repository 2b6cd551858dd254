"""The one place of the command that knows the library: loading, parsing, and running an engine."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bicache_jax.cli.options import FlagGroup, version, warn
from bicache_jax.core.config import ATTENTION, CACHED_BLOCK, CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Key, Model, Record, Request, Result
from bicache_jax.serving.inputs import Requests


class Run:
    """A loaded model and an engine, made from flags. Importing jax takes a second, so it happens here."""

    def __init__(
        self, args: argparse.Namespace, cache: CacheConfig, sampling: SamplingConfig, *, alone: bool = False
    ) -> None:
        """Loads the model.

        Args:
            args: the flags.
            cache: how prefixes are reused, but for the boundary table.
            sampling: how canvases are denoised.
            alone: make a mesh of this process's devices, though there are other processes.

        Raises:
            BicacheError: the model or the table cannot be read, or they do not go together.
        """
        import jax

        from bicache_jax.core.boundary import load_table
        from bicache_jax.serving.engine import Engine
        from bicache_jax.sharding import make_mesh

        table = load_table(args.boundary_table) if args.boundary_table is not None else None
        mesh = make_mesh(args.mesh, jax.local_devices() if alone else None) if args.mesh is not None else None
        if mesh is None and alone and jax.local_device_count() > 1:
            warn(f"this process has {jax.local_device_count()} devices and uses one of them: --mesh names more")
        self._model = load(args, mesh)
        if table is not None:
            check_table(table, args.boundary_table, self._model)
            cache = dataclasses.replace(cache, table=table.table)
        elif cache.policy == "bicache" and cache.boundary == "auto":
            cache = dataclasses.replace(cache, table=self._model.boundaries)  # a journal names what was used
        if args.early_stop is None:  # a text ends there; token ids without one are taken whole
            sampling = dataclasses.replace(sampling, early_stop=self._model.tokenizer is not None)
        self._cache, self._sampling, self._batch_size = cache, sampling, args.batch_size
        self._auto_block = CACHED_BLOCK if cache.block_cache != "off" and args.block_length is None else None
        self._engine = Engine(
            self._model,
            cache=cache,
            sampling=sampling,
            batch_size=args.batch_size,
            attention=args.attention,
            mesh=mesh,
        )

    @property
    def stats(self) -> Any:
        """The engine's counts."""
        return self._engine.stats

    def parse(self, requests: Requests) -> list[Request | Result]:
        """Tokenises requests; a bad line becomes the result that says so."""
        from bicache_jax.serving.requests import parse_requests

        model = self._model
        return parse_requests(
            requests.lines,
            config=model.config,
            tokenizer=model.tokenizer,
            sampling=self._sampling,
            source=requests.source,
            auto_block=self._auto_block,
        )

    def iterate(self, lines: Iterable[bytes], source: str) -> Iterator[Request | Result]:
        """Tokenises lines one by one."""
        from bicache_jax.serving.requests import iter_requests

        model = self._model
        return iter_requests(
            lines, config=model.config, tokenizer=model.tokenizer, sampling=self._sampling, source=source
        )

    def settle(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the prefixes that they have among each other, whatever they will be run with."""
        lengths = {row.request.id: row.prefix_len for row in self._engine.plan(requests).rows}
        return [dataclasses.replace(request, prefix_len=lengths[request.id]) for request in requests]

    def divide(self, requests: Sequence[Request], parts: int) -> list[int]:
        """Divides settled requests by prefix into parts of equal work; returns the part of each."""
        from bicache_jax.serving.balance import Group, pack
        from bicache_jax.serving.flops import encode_flops
        from bicache_jax.serving.rounds import row_costs

        config = self._model.config
        rows = self._engine.plan(requests).rows
        costs, setups = dict.fromkeys((request.id for request in requests), 0.0), {}
        for row, cost in zip(rows, row_costs(config, self._cache, rows), strict=True):
            costs[row.request.id] += cost
            setups[row.request.id] = float(encode_flops(config, row.prefix_len, row.boundary))
        members: dict[tuple[int, ...], list[int]] = {}
        for place, request in enumerate(requests):
            prefix = request.prompt_ids[: request.prefix_len]
            members.setdefault(prefix or (-1 - place,), []).append(place)  # without a prefix nothing is shared
        groups = [
            Group(max(setups[requests[p].id] for p in places), tuple(costs[requests[p].id] for p in places))
            for places in members.values()
        ]
        found = [0] * len(requests)
        for places, assigned in zip(members.values(), pack(groups, parts), strict=True):
            for place, part in zip(places, assigned, strict=True):
                found[place] = part
        return found

    def describe(self, requests: Sequence[Request]) -> str:
        """What would be run, for people."""
        return self.plan(requests).describe()

    def plan(self, requests: Sequence[Request]) -> Any:
        """What would be run."""
        return self._engine.plan(requests)

    def identity(self, requests: Requests) -> dict[str, Any]:
        """Everything that determines results, by the names the user knows."""
        tokens = hashlib.sha256()
        for request in requests.valid:
            tokens.update(json.dumps(dataclasses.astuple(request)).encode())
        cache = dataclasses.asdict(self._cache)
        if cache["table"] is not None:
            cache["table"] = {str(ratio): layers for ratio, layers in sorted(cache["table"].items())}
        if cache["batch_boundary"] == "min":  # only then do results depend on who is batched with whom
            cache["batch_size"] = self._batch_size
        return {
            "version": version(),
            "model": self._model.fingerprint,
            "dtype": str(self._model.params["embed"].dtype),
            "mask_id": self._model.config.mask_id,
            **cache,
            **dataclasses.asdict(self._sampling),
            "input": requests.digest,
            "tokens": tokens.hexdigest(),  # the input through tokenizer and chat template
        }

    def stream(self, requests: Sequence[Request], finished: Mapping[Key, Record], *, partial: bool) -> Iterator[Record]:
        """Runs what is not finished.

        Args:
            requests: all requests that can run: a prefix is what a request shares with the others of the file, the
                finished ones included.
            finished: results there are already.
            partial: whether to yield unfinished results at interval edges.

        Yields:
            Results as they happen; unfinished ones have no finish reason.
        """
        from jax.errors import JaxRuntimeError

        if finished:
            prefixes = {row.request.id: row.prefix_len for row in self._engine.plan(requests).rows}
            requests = [dataclasses.replace(request, prefix_len=prefixes[request.id]) for request in requests]
        try:
            while todo := remaining(requests, finished):
                first = {request.id: sample for request, sample in todo}
                for result in self._engine.stream([request for request, _ in todo], partial=partial):
                    yield {**result.to_json(), "sample": result.sample + first[result.id]}
                finished = {**finished, **{(r.id, s + i): {} for r, s in todo for i in range(r.n)}}
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise BicacheError("the device is out of memory: choose a smaller --batch-size") from error


def check_table(table: Any, name: str, model: Model) -> None:
    """A table of another checkpoint may serve, as the published ones do, with a warning; one of another depth cannot.

    Raises:
        BicacheError: the table is for another depth.
    """
    if table.num_layers != model.config.num_layers:
        raise BicacheError(
            f"--boundary-table {name} is for a model of {table.num_layers} layers, and {model.name} has"
            f" {model.config.num_layers}"
        )
    if table.fingerprint and table.fingerprint != model.fingerprint:
        warn(f"--boundary-table {name} was made for another checkpoint ({table.model})")


def remaining(requests: Sequence[Request], finished: Mapping[Key, Any]) -> list[tuple[Request, int]]:
    """What is left to run.

    Args:
        requests: all requests.
        finished: finished (id, sample).

    Returns:
        Requests, each with the number of its first sample: one gapless stretch of samples per request, so that the
        engine's sample numbers can be told apart. Where there are gaps, call again when that is done.
    """
    todo = []
    for request in requests:
        missing = [sample for sample in range(request.n) if (request.id, sample) not in finished]
        if not missing:
            continue
        first = missing[0]
        n = next((i for i, sample in enumerate(missing) if sample != first + i), len(missing))
        sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + first)
        todo.append((dataclasses.replace(request, sampling=sampling, n=n), first))
    return todo


def load(args: argparse.Namespace, mesh: Any = None) -> Model:
    """Loads the model that the flags name, onto a mesh if there is one, compiled programs kept as they say.

    Raises:
        BicacheError: it cannot be read.
    """
    from bicache_jax.loading import load_model

    start_compilation_cache(args)
    return load_model(
        args.model, dtype=args.dtype, mask_id=args.mask_id, mesh=mesh, check_weights=args.check_weights
    )


def random(args: argparse.Namespace) -> Model:
    """Makes the random model that the flags name, compiled programs kept as they say.

    Raises:
        BicacheError: there is no such shape.
    """
    from bicache_jax.loading import random_model

    start_compilation_cache(args)
    return random_model(args.random, dtype=args.dtype)


def add_attention_flag(group: FlagGroup) -> None:
    """Adds the flag that picks an implementation of attention."""
    group.add_argument(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="implementation of attention; auto: the kernel of the platform, xla: plain JAX, a name: that kernel or an"
        " error (default: %(default)s)",
    )


def add_compilation_flags(group: FlagGroup) -> None:
    """Adds the flags of the persistent compilation cache."""
    compilation = group.add_mutually_exclusive_group()
    compilation.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept for the next run (default: $BICACHE_COMPILATION_CACHE, or bicache-jax/"
        " in the user's cache folder; $JAX_COMPILATION_CACHE_DIR stays)",
    )
    compilation.add_argument("--no-compilation-cache", action="store_true", help="keep none")


def start_compilation_cache(args: argparse.Namespace) -> None:
    """Lets XLA keep compiled programs for the next run, unless the user has set that up already.

    Raises:
        BicacheError: the folder that the flags name cannot be written.
    """
    from bicache_jax.serving.compilation import use_compilation_cache

    folder = args.compilation_cache
    try:
        use_compilation_cache(False if args.no_compilation_cache else folder)
    except OSError as error:
        named = f"--compilation-cache {folder}" if folder else "the folder that $BICACHE_COMPILATION_CACHE names"
        raise BicacheError(f"cannot write {named}: {error.strerror}") from error
