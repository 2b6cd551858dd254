"""A stand-in for the library behind `bicache generate`: known answers, a result every few milliseconds, no jax.

As a program it is the command with that stand-in, for tests that kill it: `python tests/fake_run.py generate ...`.
"""

from __future__ import annotations

import contextlib
import json
import time
import types
from pathlib import Path

from bicache_jax.cli import backend, entry
from bicache_jax.core.types import BicacheError, Request, Result
from bicache_jax.serving.inputs import remaining


class FakeSession:
    """Answers each prompt with its own letters turned round; the last request finishes first.

    `--model` is taken as options: `error=ID` lets the engine fail on a request, `missing` is no model at all,
    `wait=SECONDS` is the time a result takes.
    """

    def __init__(self, args, cache, sampling, *, alone=False):
        self.options = dict(part.partition("=")[::2] for part in args.model.split(","))
        if "missing" in self.options:
            raise BicacheError("missing: no such folder;\nname a checkpoint folder")
        self.sampling = sampling
        self.cache = cache
        self.counts = types.SimpleNamespace(
            tokens=0, seconds=2.0, compile_seconds=1.0, forward_passes=7, passes_saved=0, prefix_hits=3, rows=0
        )

    @property
    def stats(self):
        return self.counts

    def parse(self, requests):
        return list(self.iterate(requests.lines, requests.source))

    def iterate(self, lines, source):
        index, seen = 0, set()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig"))
                name = str(fields.get("id", number))
                if name in seen:
                    raise ValueError("repeated id")
                seen.add(name)
                prompt = tuple(fields["prompt"].encode())
                yield Request(name, prompt, n=fields.get("n", 1), index=index, sampling=self.sampling)
            except (ValueError, KeyError, AttributeError) as error:
                yield Result(str(number), finish_reason="error", error=f"{source}, line {number}: {error!r}")
            index += 1

    def settle(self, requests):
        return list(requests)

    def divide(self, requests, parts):
        return [sum(request.prompt_ids[:9]) % parts for request in requests]

    def describe(self, requests):
        return f"{len(requests)} requests, boundary {self.cache.boundary}"

    def identity(self, requests):
        return {"model": "fake", "seed": self.sampling.seed, "input": requests.digest}

    def stream(self, requests, finished, *, partial, every=None, frame_seconds=0.1):
        for request, first in reversed(remaining(requests, finished)):
            for sample in range(request.n):
                text = bytes(request.prompt_ids).decode()[::-1]
                result = Result(
                    request.id,
                    first + sample,
                    (1, 2),
                    text,
                    prefix_len=5,
                    boundary=3,
                    steps=request.sampling.seed + sample,  # what the noise would be made of
                )
                if partial:
                    yield {**result.to_record(), "text": "", "finish_reason": None}
                time.sleep(float(self.options.get("wait", 0)))
                if self.options.get("error") == request.id:
                    yield Result(request.id, finish_reason="error", error=f"{request.id}: does not fit").to_record()
                    break
                while self.options.get("deaf") == request.id:  # as in jax's callback of the garbage collector
                    with contextlib.suppress(KeyboardInterrupt):
                        time.sleep(60)
                if self.options.get("interrupt") == request.id:
                    raise KeyboardInterrupt
                if "log" in self.options:
                    with open(self.options["log"], "a") as log:
                        log.write(f"{request.id}/{first + sample}\n")
                self.counts.tokens += 2
                yield {**result.to_record(), "created": time.time_ns()}  # no two runs agree on it


def write_requests(path: Path, count: int, **more) -> Path:
    """A file of `count` requests; with n samples, request i has n + i % 2."""
    lines = []
    for i in range(count):
        fields = {"id": f"r{i}", "prompt": f"prompt {i} \u2028", **more}
        if "n" in fields:
            fields["n"] += i % 2
        lines.append(json.dumps(fields, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    backend.open_session = FakeSession  # type: ignore[assignment]
    entry()
