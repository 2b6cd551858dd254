"""`bicache generate`: requests in, results out."""

from __future__ import annotations

import argparse
import json
import sys

from bicache_jax.cli import backend
from bicache_jax.cli.canvas import Canvas, is_terminal
from bicache_jax.cli.decoding import add_decoding_flags, add_step_flags, sampling_from_flags
from bicache_jax.cli.file_run import FileRun, status
from bicache_jax.cli.interrupt import ends_at_once
from bicache_jax.cli.options import Parser, auto_or_integer, integer
from bicache_jax.cli.outputs import write_event
from bicache_jax.cli.presets import add_preset_flag, preset_summary
from bicache_jax.cli.report import closing_line
from bicache_jax.cli.running import add_cache_arguments, add_device_arguments, add_model_arguments, cache_from_flags
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import Result
from bicache_jax.serving.inputs import read_requests
from bicache_jax.serving.results import FORMATS, ResultFormat

HELP = "answer a file of requests"
DESCRIPTION = """\
Answers requests with a diffusion language model. Prompts that share a prefix have it encoded once.

A request is a JSON object on one line, with one of
  "prompt": text    "messages": [{"role": ..., "content": ...}, ...]    "prompt_ids": [token, ...]
  "template": text with holes    "template_ids": [token, ...], in which each run of the model's mask token is a hole
where content is a text or a list of {"type": "text", "text": ...}. A hole is {mask:N}, N tokens long, and a brace of
the text is doubled, {{ or }}; or a template is a list of texts and of lengths of holes. Messages may end with one, as
{"role": "assistant", "template": ...}. The model sees what stands between and behind the holes. And optionally
  "id": a name (default: the number of the line)   "prefix_len": tokens of the prefix   "n": samples
  "stop": a string or a list of strings that end the text, or that of the hole in which they are
  "trim": whether the text of a hole ends at an end of text (templates only; default: false)
  decoding settings in place of the flags: "gen_length", "steps", "steps_per_block", "block_length", "early_stop",
  "seed", "temperature", "top_p", "top_k", "cfg_scale", "remasking", "alg_temperature", "threshold", "factor",
  "entropy_bound", "editing_threshold", "suppress_tokens", "logits_eos_inf", "confidence_eos_eot_inf"
  notes, which change no result: "answer" (a string or a list of strings that are right), "kind", "metadata"
Any other key is an error. Alone or among these, lines of OpenAI's batch format work, such as
  {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {...}}
with messages or prompt, max_tokens or max_completion_tokens, temperature, top_p, seed, n, stop and the settings above
in the body; model is ignored, stream must be false. max_tokens takes the smallest canvas of whole blocks that holds as
many, at the pace of the flags (tokens a step), and the text ends after max_tokens.

A request gets the same tokens wherever its prefix is the same; --prefix-detection says where prefixes come from."""
EPILOG = f"""\
presets:
{preset_summary()}

exit status: 0 all is well, 2 bad flags or an unreadable file, 3 some requests have an error as their result,
130 interrupted (finished results are kept in OUTPUT.journal; the same command with --resume continues).

examples:
  bicache generate --model example --input examples/requests.jsonl --output out.jsonl
  bicache generate --model ./LLaDA-8B-Instruct --input - --output - --gen-length 256 --steps 128 --block-length 32"""


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `generate`."""
    files = parser.add_argument_group("input and output")
    files.add_argument("--input", required=True, metavar="FILE", help="requests, JSON lines; - reads standard input")
    files.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="results, JSON lines in input order, written whole at the end, when they replace what is there; - writes"
        " standard output (default: -)",
    )
    again = files.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue OUTPUT.journal after a run that was cut short; where OUTPUT is complete, check by"
        " OUTPUT.manifest.json that it is this run's",
    )
    again.add_argument("--overwrite", action="store_true", help="start over, whatever an earlier run left")
    files.add_argument(
        "--stream",
        action="store_true",
        help="show results on standard output as they happen, unfinished ones too: on a terminal the canvases fill in,"
        " anything else gets JSON lines, with finish_reason null and the masked positions where one is unfinished",
    )
    files.add_argument(
        "--stream-every",
        type=auto_or_integer(1),
        default="auto",
        metavar="auto|K",
        help="denoising steps between two looks at the canvases, which change no token; auto: as many as take a tenth"
        " of a second (default: %(default)s)",
    )

    add_running_arguments(parser)
    add_answering_arguments(parser)


def add_running_arguments(parser: Parser, *, required: bool = True, gen_length: int | None = 128) -> None:
    """Adds the flags that say what to run and how, whatever the files are.

    Args:
        parser: where to.
        required: whether there must be a model.
        gen_length: response tokens where the flag is not given; None: what is asked says how many.
    """
    add_model_arguments(parser, required=required)
    add_cache_arguments(parser)

    decoding = parser.add_argument_group("length and seed", "a request's own settings override these and the following")
    add_preset_flag(parser, decoding)
    usual = "those that are asked for" if gen_length is None else "%(default)s"
    decoding.add_argument(
        "--gen-length", type=integer(1), default=gen_length, metavar="N", help=f"response tokens (default: {usual})"
    )
    add_step_flags(decoding)
    decoding.add_argument(
        "--block-length",
        type=integer(1),
        metavar="N",
        help="tokens of a block; blocks are finished left to right (default: gen-length; 32 with a block cache)",
    )
    decoding.add_argument(
        "--early-stop",
        action=argparse.BooleanOptionalAction,
        help="end a row with the first finished block that holds an end of text, and fill the rest of token_ids with"
        " it; text and finish_reason stay as they would be (default: on where the model has a tokenizer, and so results"
        " have a text)",
    )
    decoding.add_argument(
        "--seed",
        type=integer(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the noise; sample i of a request takes seed + i (default: %(default)s)",
    )

    add_decoding_flags(parser)

    add_device_arguments(parser)


def add_answering_arguments(parser: Parser) -> None:
    """Adds the flags of commands that answer requests, rather than plan it."""
    answering = parser.add_argument_group("answers")
    answering.add_argument(
        "--output-format",
        choices=FORMATS,
        default="native",
        help="native: one result a line, one for each sample; openai: OpenAI's batch output, one line for each request"
        " with its samples as choices; --stream shows native results (default: %(default)s)",
    )
    answering.add_argument(
        "--dry-run", action="store_true", help="print the plan (groups, boundaries, shapes, memory, gain), run nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `bicache generate`; returns the exit status."""
    if args.dry_run:
        return show_plan(args)
    cache, sampling = configurations(args)
    with FileRun(args, "results", stream=args.stream) as job:
        requests = job.requests
        run = backend.open_session(args, cache, sampling)
        requests.items = run.parse(requests)
        form = result_format(args)
        complete = job.begin(form, {**run.identity(requests), **form.identity})
        if complete is not None:
            return complete
        drawn = args.stream and is_terminal(sys.stdout)
        show = (Canvas().show if drawn else write_event) if args.stream else lambda record: None
        for item in requests.items:
            if isinstance(item, Result):
                show(item.to_json())
        every = None if args.stream_every == "auto" else args.stream_every
        events = run.stream(requests.valid, job.output.finished, partial=args.stream, every=every)
        records = job.collect(events, bar=not (args.quiet or drawn), show=show)
    if not args.quiet:
        print(closing_line(records, requests, run.stats, job.resumed), file=sys.stderr)
    return status(records)


def configurations(args: argparse.Namespace) -> tuple[CacheConfig, SamplingConfig]:
    """What the flags say about caching and decoding.

    Raises:
        BicacheError: flags that do not go together.
    """
    cache = cache_from_flags(args)
    sampling = sampling_from_flags(
        args,
        gen_length=args.gen_length,
        seed=args.seed,
        early_stop=bool(args.early_stop),
    )
    return cache, sampling


def result_format(args: argparse.Namespace) -> ResultFormat:
    """The format of results that the flags name."""
    return ResultFormat(args.output_format, args.model)


def show_plan(args: argparse.Namespace, *, as_json: bool = False) -> int:
    """Prints what `generate` would do with these flags; returns the exit status."""
    cache, sampling = configurations(args)
    with ends_at_once(lambda: ""):
        requests = read_requests(args.input)
        run = backend.open_session(args, cache, sampling)
        requests.items = run.parse(requests)
        valid = requests.valid
        print(json.dumps(run.plan(valid).to_json(), indent=1) if as_json else run.describe(valid))
    errors = [item.to_json() for item in requests.items if isinstance(item, Result)]
    for error in errors:
        print(f"bicache: {error['error']}", file=sys.stderr)
    return status(errors)
