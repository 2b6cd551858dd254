"""`bicache profile`: makes the boundary table of a model."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bicache_jax.bulk.journal import Journal, journal_path, write_atomic
from bicache_jax.cli import backend
from bicache_jax.cli.options import DTYPE_HELP, add_checkpoint_flags, fraction, integer
from bicache_jax.core.config import DTYPES, SamplingConfig
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.core.version import version
from bicache_jax.serving.inputs import read_requests

HELP = "measure how deep a model's prefixes stay valid, and write its boundary table"
DESCRIPTION = """\
Compares, layer by layer, the keys and values that a prefix gets alone with those it gets in the whole sequence, and
writes a boundary table: for each prefix ratio the leading layers whose mean cosine similarity stays above a threshold.
A table that lies in the model's folder as boundary_table.json is used there by --boundary auto."""
EPILOG = """\
examples:
  bicache profile --model ./my-llada --data requests.jsonl --output ./my-llada/boundary_table.json
  bicache profile --model ./my-llada --data texts.jsonl --synthetic --samples 64 --output table.json"""


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
        "--synthetic", action="store_true", help="take the prompts as plain text and split them at every ratio"
    )
    what.add_argument(
        "--samples", type=integer(1), default=64, metavar="N", help="most samples of a ratio (default: %(default)s)"
    )
    what.add_argument(
        "--ratio-step", type=integer(1, 50), default=5, metavar="PERCENT", help="between ratios (default: %(default)s)"
    )
    what.add_argument(
        "--threshold",
        type=fraction,
        default=0.97,
        metavar="X",
        help="similarity above which a layer is shallow (default: %(default)s, as published)",
    )
    what.add_argument(
        "--with-response", action="store_true", help="append the masked response to the prompt (published: without)"
    )
    what.add_argument(
        "--gen-length", type=integer(1), default=128, metavar="N", help="its tokens (default: %(default)s)"
    )
    what.add_argument(
        "--max-tokens", type=integer(2), default=1024, metavar="N", help="of a split text (default: 1024)"
    )
    what.add_argument("--seed", type=integer(0, 2**31 - 1), default=0, metavar="N", help="of the splits (default: 0)")
    what.add_argument("--quiet", action="store_true", help="no progress bar and no closing line")
    backend.add_attention_flag(what)
    backend.add_compilation_flags(what)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache profile`; returns the exit status."""
    from tqdm import tqdm

    from bicache_jax.measure.profile import make_table, measure, refuse_exact

    data = read_requests(args.data, flag="--data")
    plot = None if args.no_plot else Path(args.plot or Path(args.output).with_suffix(".png"))
    if plot is not None:
        _require_matplotlib(explicit=args.plot is not None)
    with ExitStack() as stack:
        path = journal_path(args.output)
        journal = stack.enter_context(Journal(path, resume=args.resume, overwrite=args.overwrite))
        model = backend.load(args)
        refuse_exact(model, f"--model {args.model}")
        samples = _samples(args, model, data.lines, data.source)
        settings = {name: value for name, value in vars(args).items() if name in _DETERMINING}
        shape = hashlib.sha256(json.dumps([[s.ids, s.prefix_len] for s in samples]).encode()).hexdigest()
        journal.begin({"version": version(), "model": model.fingerprint, **settings, "samples_hash": shape})
        todo = [place for place in range(len(samples)) if (str(place), 0) not in journal.finished]
        bar = stack.enter_context(
            tqdm(
                total=len(samples),
                initial=len(samples) - len(todo),
                unit="sample",
                disable=args.quiet or not sys.stderr.isatty(),
                leave=False,
            )
        )
        for place, similarity in measure(model, [samples[place] for place in todo], attention=args.attention):
            journal.add({"id": str(todo[place]), "sample": 0, "similarity": [float(value) for value in similarity]})
            bar.update()
        measured = [
            (sample.ratio, journal.finished[str(place), 0]["similarity"]) for place, sample in enumerate(samples)
        ]
        table = make_table(model, measured, threshold=args.threshold)
        write_atomic(args.output, [json.dumps(table.to_json(), indent=2).encode() + b"\n"])
        if plot is not None and _has_matplotlib():
            from bicache_jax.measure.plots import DPI, similarity_heat_map

            similarity_heat_map(table).savefig(plot, dpi=DPI)
        journal.remove()
    if not args.quiet:
        listed = " ".join(f"{ratio}:{boundary}" for ratio, boundary in table.table.items())
        print(f"bicache: {len(samples)} samples, b(r) = {listed}", file=sys.stderr)
    return 0


_DETERMINING = ("synthetic", "samples", "ratio_step", "with_response", "gen_length", "max_tokens", "seed", "dtype")


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
        per_ratio=args.samples,
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
