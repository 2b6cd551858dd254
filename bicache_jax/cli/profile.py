"""`bicache profile`: makes the boundary table of a model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bicache_jax.bulk.journal import Journal, journal_path, write_atomic
from bicache_jax.cli import backend
from bicache_jax.cli.decoding import add_step_flags
from bicache_jax.cli.options import DTYPE_HELP, add_checkpoint_flags, fraction, from_flags, integer, refuse_flags, warn
from bicache_jax.core.config import CRITERIA, DTYPES, SamplingConfig
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.core.version import version
from bicache_jax.serving.inputs import read_requests

if TYPE_CHECKING:
    from bicache_jax.core.boundary import BoundaryTable

PER_RATIO = 64
"""Most samples of a ratio where no number is named."""
HELP = "measure how deep a model's prefixes stay valid, and write its boundary table"
DESCRIPTION = """\
Writes a boundary table, by one of two criteria. By similarity, as published, it compares, layer by layer, the keys and
values that a prefix gets alone with those it gets in the whole sequence: b is the number of leading layers whose mean
cosine similarity stays above a threshold. By answers, it answers requests with and without a prefix cache: b is the
largest boundary whose mean loss is shown to stay within a bound. A table that lies in the model's folder as
boundary_table.json is used there by --boundary auto.

What a request loses by answers: with an "answer" (a string, or a list of strings that count as right) its right answer,
as --scorer says; without one the share of response tokens that differ from those without a cache. Boundaries are found
by bisection, each given up or accepted as soon as enough requests have said so; where all of them leave it open, a
smaller one is taken. The confidence is that of each boundary tested. The refresh interval is looked for in the same way
over the boundaries found, and is advice."""
EPILOG = """\
examples:
  bicache profile --model ./my-llada --data requests.jsonl --output ./my-llada/boundary_table.json
  bicache profile --model ./my-llada --data texts.jsonl --synthetic --samples 64 --output table.json
  bicache profile --model ./my-llada --data questions.jsonl --criterion answers --max-loss 0.5 --output table.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `profile`."""
    files = parser.add_argument_group("input and output")
    files.add_argument("--data", required=True, metavar="FILE", help="calibration requests, JSON lines (see generate)")
    files.add_argument("--output", required=True, metavar="FILE", help="boundary table, JSON")
    files.add_argument("--plot", metavar="FILE", help="heat map, PNG (default: OUTPUT with .png; needs matplotlib)")
    files.add_argument("--no-plot", action="store_true", help="draw nothing")
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue OUTPUT.journal after a run that was cut short")
    again.add_argument("--overwrite", action="store_true", help="begin again, whatever an earlier run left")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, metavar="M", help="folder in Hugging Face layout, hub id, or 'example'"
    )
    add_checkpoint_flags(model)
    model.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)

    what = parser.add_argument_group("measurement")
    what.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="similarity",
        help="what boundaries are chosen by (default: similarity)",
    )
    what.add_argument(
        "--synthetic", action="store_true", help="take the prompts as plain text and split them at every ratio"
    )
    what.add_argument(
        "--samples",
        type=integer(1),
        metavar="N",
        help="most samples of a ratio (default: 64); by answers most requests in all (default: all)",
    )
    what.add_argument(
        "--ratio-step", type=integer(1, 50), default=5, metavar="PERCENT", help="between ratios (default: %(default)s)"
    )
    what.add_argument(
        "--threshold",
        type=fraction,
        default=0.97,
        metavar="X",
        help="similarity above which a layer is shallow (default: %(default)s, as published); by answers only of the"
        " boundary that the table sets beside",
    )
    what.add_argument(
        "--with-response", action="store_true", help="append the masked response to the prompt (published: without)"
    )
    what.add_argument(
        "--gen-length",
        type=integer(1),
        default=128,
        metavar="N",
        help="its tokens; by answers response tokens, where a request names none (default: %(default)s)",
    )
    what.add_argument(
        "--max-tokens", type=integer(2), default=1024, metavar="N", help="of a split text (default: 1024)"
    )
    what.add_argument(
        "--seed",
        type=integer(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of the splits; by answers of the order in which requests are asked (default: 0)",
    )
    what.add_argument("--quiet", action="store_true", help="no progress bar and no closing line")
    backend.add_attention_flag(what)
    backend.add_compilation_flags(what)

    answers = parser.add_argument_group("by answers")
    answers.add_argument(
        "--max-loss",
        type=_points,
        metavar="POINTS",
        help="largest mean loss, in points of a hundred (default: 0.5, or what so few requests can show)",
    )
    answers.add_argument(
        "--confidence",
        type=_confidence,
        default=0.95,
        metavar="C",
        help="with which a boundary that is chosen loses no more (default: %(default)s)",
    )
    answers.add_argument(
        "--scorer",
        default="exact",
        metavar="S",
        help="what is right: exact, numeric, choice, or module:function taking (text, answers) (default: %(default)s)",
    )
    add_step_flags(answers)
    answers.add_argument("--block-length", type=integer(1), metavar="N", help="tokens of a block (default: gen-length)")


def _points(text: str) -> float:
    """The argument type of points of a hundred, above 0 and below 100."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 100.0:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 100, got {text!r}")
    return value


def _confidence(text: str) -> float:
    """The argument type of numbers between 0 and 1, without them."""
    value = fraction(text)
    if value in (0.0, 1.0):
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs `bicache profile`; returns the exit status."""
    from bicache_jax.measure.profile import refuse_exact

    for criterion, names in _ONLY.items():
        if criterion != args.criterion:
            refuse_flags(args, names, add_arguments, f"is for --criterion {criterion}")
    data = read_requests(args.data, flag="--data")
    plot = None if args.no_plot else Path(args.plot or Path(args.output).with_suffix(".png"))
    if plot is not None:
        _require_matplotlib(explicit=args.plot is not None)
    with ExitStack() as stack:
        path = journal_path(args.output)
        journal = stack.enter_context(Journal(path, resume=args.resume, overwrite=args.overwrite))
        model = backend.load(args)
        refuse_exact(model, f"--model {args.model}")
        make = _by_answers if args.criterion == "answers" else _by_similarity
        table, told = make(args, model, data.lines, data.source, journal, stack)
        write_atomic(args.output, [json.dumps(table.to_json(), indent=2).encode() + b"\n"])
        if plot is not None and _has_matplotlib():
            from bicache_jax.measure.plots import DPI, similarity_heat_map

            similarity_heat_map(table).savefig(plot, dpi=DPI)
        journal.remove()
    if not args.quiet:
        for line in told:
            print(f"bicache: {line}", file=sys.stderr)
    return 0


def _by_similarity(
    args: argparse.Namespace, model: Model, lines: list[bytes], source: str, journal: Journal, stack: ExitStack
) -> tuple[BoundaryTable, list[str]]:
    """The table by similarity, and what is said of it."""
    from bicache_jax.measure.profile import make_table, measure

    samples = _samples(args, model, lines, source)
    settings = {name: value for name, value in vars(args).items() if name in _DETERMINING}
    shape = hashlib.sha256(json.dumps([[s.ids, s.prefix_len] for s in samples]).encode()).hexdigest()
    journal.begin({"version": version(), "model": model.fingerprint, **settings, "samples_hash": shape})
    todo = [place for place in range(len(samples)) if (str(place), 0) not in journal.finished]
    bar = stack.enter_context(_bar(args, unit="sample", total=len(samples), initial=len(samples) - len(todo)))
    for place, similarity in measure(model, [samples[place] for place in todo], attention=args.attention):
        journal.add({"id": str(todo[place]), "sample": 0, "similarity": [float(value) for value in similarity]})
        bar.update()
    measured = [(sample.ratio, journal.finished[str(place), 0]["similarity"]) for place, sample in enumerate(samples)]
    table = make_table(model, measured, threshold=args.threshold)
    listed = " ".join(f"{ratio}:{boundary}" for ratio, boundary in table.table.items())
    return table, [f"{len(samples)} samples, b(r) = {listed}"]


def _by_answers(
    args: argparse.Namespace, model: Model, lines: list[bytes], source: str, journal: Journal, stack: ExitStack
) -> tuple[BoundaryTable, list[str]]:
    """The table by answers, and what is said of it."""
    from bicache_jax.measure.bets import least_shown
    from bicache_jax.measure.by_answers import boundaries_by_answers, summary
    from bicache_jax.measure.evaluate import items_of
    from bicache_jax.measure.scorers import find_scorer

    if ":" in args.scorer:
        sys.path.append("")  # a scorer may lie in the current folder
    scorer = find_scorer(args.scorer)
    sampling = from_flags(
        SamplingConfig,
        gen_length=args.gen_length,
        steps=args.steps,
        steps_per_block=args.steps_per_block,
        block_length=args.block_length,
    )
    items = items_of(lines, model, sampling, f"--data {source}", unanswered=True)[: args.samples]
    names = (*_DETERMINING, "scorer", "steps", "steps_per_block", "block_length")
    asked = [[repr(dataclasses.astuple(item.request)), item.answers] for item in items]
    shape = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    settings = {name: getattr(args, name) for name in names}
    journal.begin({"version": version(), "model": model.fingerprint, **settings, "samples_hash": shape})
    least = 100 * least_shown(len(items), args.confidence)
    if args.max_loss is not None and args.max_loss < least:
        warn(
            f"--max-loss {args.max_loss:g}: {len(items)} requests of which none changes leave a loss of {least:.2g}"
            " points open; more of them can show less"
        )
    bar = stack.enter_context(_bar(args, unit="answer"))
    table = boundaries_by_answers(
        model,
        items,
        sampling=sampling,
        max_loss=None if args.max_loss is None else args.max_loss / 100,
        confidence=args.confidence,
        scorer=scorer,
        ratio_step=args.ratio_step,
        threshold=args.threshold,
        seed=args.seed,
        attention=args.attention,
        known=_Kept(journal),
        progress=lambda done: None if bar.update(done) else None,
    )
    return table, summary(table)


class _Kept(MutableMapping[str, Mapping[str, Any]]):
    """Answers in a journal, by name."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._journal.finished[name, 0]

    def __setitem__(self, name: str, answer: Mapping[str, Any]) -> None:
        self._journal.add({"id": name, "sample": 0, **answer})

    def __delitem__(self, name: str) -> None:
        raise TypeError("a journal forgets nothing")

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._journal.finished)

    def __len__(self) -> int:
        return len(self._journal.finished)


def _bar(args: argparse.Namespace, **settings: Any) -> Any:
    from tqdm import tqdm

    return tqdm(disable=args.quiet or not sys.stderr.isatty(), leave=False, **settings)


_ONLY = {
    "similarity": ("synthetic", "with_response", "max_tokens"),
    "answers": ("max_loss", "confidence", "scorer", "steps", "steps_per_block", "block_length"),
}
"""Flags of one criterion alone."""
_DETERMINING = (
    "mask_id",
    "block_causal",
    "right_shift_logits",
    "criterion",
    "synthetic",
    "samples",
    "ratio_step",
    "with_response",
    "gen_length",
    "max_tokens",
    "seed",
    "dtype",
)


def _samples(args: argparse.Namespace, model: Model, lines: list[bytes], source: str) -> list[Any]:
    from bicache_jax.measure.profile import draw_samples
    from bicache_jax.serving.requests import Parser

    sampling = SamplingConfig(gen_length=args.gen_length if args.with_response else 1)
    requests = Parser(model.config, model.tokenizer, sampling).requests(lines, f"--data {source}")
    samples = draw_samples(
        model,
        requests,
        split=args.synthetic,
        ratio_step=args.ratio_step,
        per_ratio=args.samples or PER_RATIO,
        with_response=args.with_response,
        most_tokens=args.max_tokens,
        seed=args.seed,
    )
    if not samples:
        raise BicacheError(
            f"--data {source}: no request has a shared prefix to measure; give 'prefix_len', or use --synthetic"
        )
    return samples


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _require_matplotlib(*, explicit: bool) -> None:
    if explicit and not _has_matplotlib():
        raise BicacheError("--plot needs matplotlib: pip install 'bicache-jax[plot]'")
