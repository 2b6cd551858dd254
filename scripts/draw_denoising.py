"""Draws one denoising run of the bundled model: one line per step, one cell per position of the response.

python scripts/draw_denoising.py scripts/results/denoising.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax import CacheConfig, Engine, Result, SamplingConfig, load_model
from bicache_jax.cli.options import integer
from bicache_jax.example import task

GEN_LENGTH = 8
FILL = {"masked": "#e4e4e7", "new": "#fdba74", "known": "#dbeafe"}


def main() -> None:
    """Runs the request and draws the picture."""
    parser = argparse.ArgumentParser(description="Draws one denoising run of the bundled model.")
    parser.add_argument("output", type=Path, help="image to write; the extension sets the format")
    parser.add_argument("--seed", type=integer(0), default=1, help="of the held-out document (default: %(default)s)")
    parser.add_argument("--kind", choices=task.KINDS, default="about", help="kind of question (default: %(default)s)")
    args = parser.parse_args()
    document = task.draw_document(np.random.default_rng([task.FIRST_HELD_OUT + args.seed, 5]), 6, 4)
    question = next(question for question in document.questions() if question.kind == args.kind)
    prompt = " ".join((*document.words, *question.words))
    model = load_model("example")
    # With an interval of one step, every step is streamed.
    engine = Engine(model, cache=CacheConfig(refresh_interval=1), sampling=SamplingConfig(gen_length=GEN_LENGTH))
    events = list(engine.stream([{"prompt": prompt, "prefix_len": len(document.words)}]))
    draw(model.tokenizer, f"{' '.join(question.words)}?", events, args.output)
    print(f"{args.output}: {events[-1].steps} steps, {events[-1].text!r}, expected {' '.join(question.answer)!r}")


def draw(tokenizer: Any, title: str, events: list[Result], output: Path) -> None:
    """Draws a line for each event."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    length = len(events[0].token_ids)
    before = tuple(range(length))
    figure, axes = pyplot.subplots(figsize=(0.82 * length, 0.36 * len(events) + 0.9))
    for line, event in enumerate(events):
        for position, token in enumerate(event.token_ids):
            kind = "masked" if position in event.masked else "new" if position in before else "known"
            word = "" if kind == "masked" else tokenizer.core.id_to_token(token)
            axes.add_patch(
                pyplot.Rectangle((position, -line), 0.96, 0.88, facecolor=FILL[kind], edgecolor="none", linewidth=0)
            )
            axes.text(position + 0.48, 0.42 - line, word, ha="center", va="center", fontsize=8)
        axes.text(-0.15, 0.42 - line, f"step {event.steps}", ha="right", va="center", fontsize=8, color="#52525b")
        before = event.masked
    axes.set(xlim=(-1.2, length), ylim=(1 - len(events) - 0.1, 1.1))
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
