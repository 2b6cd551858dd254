"""`bicache evaluate`: accuracy of several policies on the same questions."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import Any

from bicache_jax.cli import backend
from bicache_jax.cli.decoding import add_decoding_flags, add_step_flags, sampling_from_flags
from bicache_jax.cli.options import (
    DTYPE_HELP,
    add_cache_dtype_flag,
    add_checkpoint_flags,
    auto_or_integer,
    boundary,
    from_flags,
    integer,
    warn,
)
from bicache_jax.core.config import DTYPES, CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError
from bicache_jax.display import evaluation
from bicache_jax.serving.inputs import read_requests

HELP = "compare the accuracy of policies on the same questions"
DESCRIPTION = """\
Answers the same questions under several policies and says how accurate each is, how often it gives the very answer of
'none', and whether the difference means anything (paired bootstrap, McNemar's test). Policies are compared with 'none'
if it is among them, else with the first. Tokens/s are measured afterwards, in turns, with nothing left to compile; the
limit is the ratio to no cache that counted operations allow.

A task is 'example' (fresh questions for the bundled model, by seed) or a file of requests with an "answer" each
(a string, or a list of strings that count as right), and optionally a "kind". A model without a tokenizer is scored on
its token ids, written with spaces."""
EPILOG = """\
examples:
  bicache evaluate --model example --task example --policies none,naive,bicache --samples 400 --seed 90210 --json
  bicache evaluate --model ./LLaDA-8B-Instruct --task gsm8k.jsonl --scorer numeric --gen-length 256 --block-length 32"""

EXAMPLE_GEN_LENGTH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `evaluate`."""
    what = parser.add_argument_group("task")
    what.add_argument("--model", required=True, metavar="M", help="folder, hub id, or 'example' (see generate)")
    what.add_argument("--task", required=True, metavar="T", help="'example', or a file of requests with answers")
    what.add_argument("--policies", default="none,naive,bicache", metavar="LIST", help="(default: %(default)s)")
    what.add_argument("--samples", type=integer(1), default=400, metavar="N", help="most questions (default: 400)")
    what.add_argument(
        "--scorer",
        default="exact",
        metavar="S",
        help="exact, numeric, choice, or module:function taking (text, answers) (default: %(default)s)",
    )
    what.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_checkpoint_flags(what, formats=True)
    what.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)

    cache = parser.add_argument_group("cache and decoding")
    cache.add_argument("--boundary", type=boundary, default="auto", metavar="auto|INT", help="(default: auto)")
    cache.add_argument("--boundary-table", metavar="FILE", help="table for 'auto' (default: the model's own)")
    cache.add_argument(
        "--refresh-interval",
        type=auto_or_integer(1),
        default="auto",
        metavar="auto|N",
        help="auto: 16, for policies with a block cache a block's steps (default: %(default)s)",
    )
    add_cache_dtype_flag(cache, several=True)
    cache.add_argument("--gen-length", type=integer(1), metavar="N", help="(default: 128; 16 for the example task)")
    add_step_flags(cache)
    cache.add_argument(
        "--block-length",
        type=integer(1),
        metavar="N",
        help="(default: gen-length; 32 where a policy has a block cache)",
    )
    cache.add_argument(
        "--seed", type=integer(0, 2**31 - 1), default=0, metavar="N", help="of the questions drawn and the noise"
    )

    add_decoding_flags(parser)
    running = parser.add_argument_group("running")
    backend.add_attention_flag(running)
    running.add_argument("--batch-size", type=integer(1), metavar="N", help="rows of a batch (default: planned)")
    running.add_argument(
        "--timed",
        type=integer(0),
        default=100,
        metavar="N",
        help="questions on which speed is measured, in two or three turns; 0: not at all (default: %(default)s)",
    )
    running.add_argument("--quiet", action="store_true", help="no progress bar")
    backend.add_compilation_flags(running)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache evaluate`; returns the exit status."""
    from tqdm import tqdm

    from bicache_jax.core.boundary import load_table
    from bicache_jax.measure.evaluate import TURNS, evaluate, items_of
    from bicache_jax.measure.policies import in_forms
    from bicache_jax.measure.scorers import find_scorer

    if ":" in args.scorer:
        sys.path.append("")  # a scorer may lie in the current folder
    scorer = find_scorer(args.scorer)
    policies = [name.strip() for name in args.policies.split(",") if name.strip()]
    if not policies:
        raise BicacheError("--policies: name at least one of none, naive, bicache")
    lines, source = _lines(args)
    gen_length = args.gen_length or (EXAMPLE_GEN_LENGTH if args.task == "example" else SamplingConfig().gen_length)
    sampling = sampling_from_flags(args, gen_length=gen_length, seed=args.seed)
    cache = from_flags(CacheConfig, boundary=args.boundary, refresh_interval=args.refresh_interval)
    table = load_table(args.boundary_table) if args.boundary_table is not None else None
    with ExitStack() as stack:
        models = {}
        for name in args.quantize:
            models[name] = backend.load(argparse.Namespace(**{**vars(args), "quantize": name}))
        model = models[args.quantize[0]]
        policies = in_forms(policies, args.quantize, args.cache_dtype)
        if table is not None:
            cache = backend.with_table(args, cache, table, model)
        elif model.note and args.boundary == "auto" and any(name.startswith("bicache") for name in policies):
            warn(model.note)
        items = items_of(lines, model, sampling, f"--task {source}")[: args.samples]
        bar = stack.enter_context(
            tqdm(
                total=len(items) * len(policies) + (1 + TURNS) * len(items[: args.timed]) * len(policies),
                unit="answer",
                disable=args.quiet or not sys.stderr.isatty(),
                leave=False,
            )
        )
        results = evaluate(
            model,
            items,
            policies,
            cache=cache,
            sampling=sampling,
            scorer=scorer,
            batch_size=args.batch_size,
            attention=args.attention,
            timed=args.timed,
            formats=models,
            progress=lambda done: None if bar.update(done) else None,
        )
    if args.json:
        print(json.dumps({"model": args.model, "task": args.task, "seed": args.seed, "results": results}))
    else:
        print(evaluation(results).markdown())
    return 0


def _lines(args: argparse.Namespace) -> tuple[list[Any], str]:
    if args.task != "example":
        data = read_requests(args.task, flag="--task")
        return list(data.lines), data.source
    from bicache_jax.example import task as example_task

    return list(example_task.draw_requests(example_task.FIRST_HELD_OUT + args.seed, args.samples)), "example"
