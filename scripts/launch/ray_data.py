"""Batch inference with Ray Data: a pool of actors, each with an engine, over any source that Ray reads.

    python scripts/launch/ray_data.py --model M --input 's3://bucket/in/' --output s3://bucket/out --actors 8 --gpus 1

Ray hands each actor blocks of lines, and a prefix is shared within a block: keep requests that share one together in
the input, and blocks large (`--block`). Every request needs an `id`, since Ray does not say which line it was. Restarts
are Ray's: what is lost with an actor is one block, but a job that ends before its time begins again; for journals and
resumption run independent slices of `scripts/batch_inference.py` (`--shard I/N`) as Ray tasks instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = (
    *("id", "sample", "token_ids", "text", "finish_reason", "prefix_len", "prefix_ratio", "boundary"),
    *("refresh_interval", "steps", "forward_passes", "error"),
)


class Answer:
    """An actor: loads the model once, then answers blocks of lines."""

    def __init__(self, model: str, sampling: Mapping[str, Any], cache: Mapping[str, Any]) -> None:
        """Loads the model; `sampling` and `cache` are fields of `SamplingConfig` and `CacheConfig`."""
        from bicache_jax import CacheConfig, Engine, SamplingConfig, load_model

        self._engine = Engine(load_model(model), cache=CacheConfig(**cache), sampling=SamplingConfig(**sampling))

    def __call__(self, block: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Answers the lines in column `text`; one row a result, bad lines included."""
        requests = self._engine.parser().lines(block["text"], source="block")
        results = [result.to_json() for result in self._engine.generate(requests)]
        return {field: [result.get(field) for result in results] for field in FIELDS}


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="as in bicache generate; every node must be able to read it")
    parser.add_argument("--input", required=True, help="requests, JSON lines: whatever ray.data.read_text takes")
    parser.add_argument("--output", required=True, help="folder of results, JSON lines")
    parser.add_argument("--actors", type=int, default=1, help="engines at work (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor (default: %(default)s)")
    parser.add_argument("--block", type=int, default=4096, help="requests of a block (default: %(default)s)")
    parser.add_argument("--gen-length", type=int, default=128, help="response tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: gen-length)")
    parser.add_argument("--boundary", type=int, help="shallow layers (default: from the model's boundary table)")
    args = parser.parse_args()

    import ray

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.read_text(args.input).map_batches(
        Answer,
        fn_constructor_kwargs={
            "model": args.model,
            "sampling": {"gen_length": args.gen_length, "steps": args.steps},
            "cache": {"boundary": "auto" if args.boundary is None else args.boundary},
        },
        batch_size=args.block,
        concurrency=args.actors,
        num_gpus=args.gpus,
    ).write_json(args.output)


if __name__ == "__main__":
    main()
