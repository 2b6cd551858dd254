"""`bicache score`: how likely texts are behind prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bicache_jax.cli import backend
from bicache_jax.cli.file_run import FileRun, status
from bicache_jax.cli.options import Parser, from_flags, integer
from bicache_jax.cli.report import count
from bicache_jax.cli.running import add_cache_arguments, add_device_arguments, add_model_arguments, cache_from_flags
from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.score import METHODS, MOST_SAMPLES, Estimate
from bicache_jax.core.types import Record
from bicache_jax.serving.inputs import Requests
from bicache_jax.serving.results import ScoreFormat

if TYPE_CHECKING:
    from bicache_jax.serving.stats import Stats

HELP = "say how likely texts are behind prompts"
DESCRIPTION = """\
Scores texts with a diffusion language model: their log-likelihoods behind a prompt, and which of several choices is
likeliest. Prompts that share a prefix have it encoded once, and the choices of a prompt share all of it.

A request is a JSON object on one line, with one of
  "prompt": text    "messages": [{"role": ..., "content": ...}, ...]    "prompt_ids": [token, ...]
one of
  "continuation": text         "choices": [text, ...]
  "continuation_ids": [token, ...]    "choices_ids": [[token, ...], ...]
and optionally "id", "prefix_len", "seed", and notes, which change no score: "answer" (the right choice: its number, or
its text), "kind", "metadata". Any other key is an error. White space between a prompt and a text belongs to the text.

A score depends on its request and its prefix, never on other requests; --prefix-detection says where prefixes come
from. Where a request has none, its whole prompt is one."""
EPILOG = """\
exit status: 0 all is well, 2 bad flags or an unreadable file, 3 some requests have an error as their score,
130 interrupted (finished scores are kept in OUTPUT.journal; the same command with --resume continues).

examples:
  bicache score --model example --input examples/choices.jsonl --output scores.jsonl
  bicache score --model ./LLaDA-8B-Base --input choices.jsonl --output - --method pseudo"""


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `score`."""
    files = parser.add_argument_group("input and output")
    files.add_argument("--input", required=True, metavar="FILE", help="requests, JSON lines; - reads standard input")
    files.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="scores, JSON lines in input order, written whole at the end; - writes standard output (default: -)",
    )
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue OUTPUT.journal after a run that was cut short")
    again.add_argument("--overwrite", action="store_true", help="start over, whatever an earlier run left")
    add_model_arguments(parser)
    add_estimate_arguments(parser)
    add_score_arguments(parser)
    add_cache_arguments(parser)
    add_device_arguments(parser)


def add_estimate_arguments(parser: Parser) -> None:
    """Adds the flags that say how likelihoods are estimated."""
    estimate, default = parser.add_argument_group("likelihoods"), Estimate()
    estimate.add_argument(
        "--method",
        choices=METHODS,
        default=default.method,
        help="monte_carlo: LLaDA's estimate from samples of masked tokens; pseudo: all tokens masked, in one pass;"
        " exact: every set of masked tokens, for texts (under block-causal attention: blocks) of at most 10 tokens"
        " (default: %(default)s)",
    )
    estimate.add_argument(
        "--samples",
        type=integer(1, MOST_SAMPLES),
        default=default.samples,
        metavar="N",
        help="samples of an estimate; equal ones are looked at once (default: %(default)s)",
    )
    estimate.add_argument(
        "--batch",
        type=integer(1, MOST_SAMPLES),
        default=default.batch,
        metavar="N",
        help="samples among which the numbers of masked tokens are spread evenly; the standard error comes from the"
        " differences between batches (default: %(default)s)",
    )


def add_score_arguments(parser: Parser) -> None:
    """Adds the flags of scores of a file."""
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--greedy",
        action="store_true",
        help="also say whether decoding at temperature 0, a token a step, gives each text (default: off)",
    )
    scores.add_argument(
        "--seed",
        type=integer(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the samples of a request that names none (default: %(default)s)",
    )


def estimate_from_flags(args: argparse.Namespace) -> Estimate:
    """What the flags say about likelihoods.

    Raises:
        BicacheError: flags that do not go together.
    """
    return from_flags(
        Estimate, method=args.method, samples=args.samples, batch=args.batch, greedy=getattr(args, "greedy", False)
    )


def run(args: argparse.Namespace) -> int:
    """Runs `bicache score`; returns the exit status."""
    cache, estimate = cache_from_flags(args), estimate_from_flags(args)
    with FileRun(args, "scores") as job:
        requests = job.requests
        args.early_stop = False
        session = backend.open_session(args, cache, SamplingConfig(seed=args.seed))
        requests.items = session.read_scores(requests, estimate)
        complete = job.begin(ScoreFormat(), {"command": "score", **session.score_identity(requests, estimate)})
        if complete is not None:
            return complete
        scores = session.scores(requests.valid, estimate, job.output.finished)
        records = job.collect((score.to_record() for score in scores), bar=not args.quiet)
    if not args.quiet:
        print(_closing_line(records, requests, session.stats, job.resumed), file=sys.stderr)
    return status(records)


def _closing_line(records: Sequence[Record], requests: Requests[Any], stats: Stats, resumed: int) -> str:
    """The run in one line."""
    errors = sum(record["finish_reason"] == "error" for record in records)
    done = count(len(records), "score")
    notes = [f"{errors} of them errors"] * bool(errors) + [f"{resumed} from the journal"] * bool(resumed)
    parts = [f"{done} ({', '.join(notes)})" if notes else done]
    right = [
        record["label"] == answer
        for record, answer in zip(records, _answers(requests), strict=True)
        if answer is not None and record["finish_reason"] != "error"
    ]
    if right:
        parts.append(f"accuracy {sum(right) / len(right):.3f} ({sum(right)} of {len(right)})")
    parts.append(f"{stats.scored} texts in {stats.seconds:.1f} s, {stats.compile_seconds:.1f} s of it compilation")
    parts.append(f"{stats.forward_passes} forward passes, {stats.prefixes_encoded} prefixes encoded")
    return f"bicache: {'; '.join(parts)}"


def _answers(requests: Requests[Any]) -> list[int | None]:
    """The number of each request's right choice; None where it is not said."""
    found: list[int | None] = []
    for answer, choices in zip(requests.notes("answer"), requests.notes("choices"), strict=True):
        if isinstance(choices, list) and isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        found.append(answer if isinstance(answer, int) and not isinstance(answer, bool) else None)
    return found
