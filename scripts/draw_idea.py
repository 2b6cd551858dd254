"""Draws the pictures of the documentation: what each kind of step computes, and a run of the bundled model.

python scripts/draw_idea.py docs/_static
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax import CacheConfig, Engine, Model, Result, SamplingConfig, load_model
from bicache_jax.example import task

GEN_LENGTH, BOUNDARY, INTERVAL = 8, 4, 4
COLOURS = {"computed": "#fb923c", "alone": "#60a5fa", "kept": "#5eead4", "nothing": "#f4f4f5"}
WORDS = {
    "computed": "computed in this step",
    "alone": "prefix KV encoded alone, shared by all rows",
    "kept": "prefix KV of the last refresh, each row's own",
    "nothing": "not needed",
}
# What happens to (prefix below the boundary, prefix above it, suffix) in each kind of step.
KINDS: Mapping[str, tuple[str, str, str]] = {
    "encode": ("computed", "nothing", "nothing"),
    "refresh": ("alone", "computed", "computed"),
    "reuse": ("alone", "kept", "computed"),
}
TITLES = {
    "encode": "once: encode the prefix alone",
    "refresh": "refresh step: every N steps",
    "reuse": "reuse step: the others",
}
WIDTHS = (5.2, 3.0, 3.0)  # of the columns: prefix, rest of the prompt, response; not to scale
INK, DIM = "#18181b", "#52525b"


def main() -> None:
    """Runs the request and draws the pictures."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("output", type=Path, help="folder to write into")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = load_model("example")
    question, prefix, events = run(model)
    for name, write in {
        "steps.png": lambda path: draw_kinds(model.config.num_layers, path),
        "run.webp": lambda path: animate(model, question, prefix, events, path),
        "similarity.png": draw_similarity,
    }.items():
        path = args.output / name
        write(path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def run(model: Model) -> tuple[str, int, list[Result]]:
    """Asks one question about a document that the model has never seen; every step is seen."""
    document = task.draw_document(np.random.default_rng([task.FIRST_HELD_OUT + 1, 5]), 6, 4)
    question = next(question for question in document.questions() if question.kind == "about")
    engine = Engine(
        model,
        cache=CacheConfig(boundary=BOUNDARY, refresh_interval=INTERVAL),
        sampling=SamplingConfig(gen_length=GEN_LENGTH),
    )
    prompt = " ".join((*document.words, *question.words))
    events = list(engine.stream({"prompt": prompt, "prefix_len": len(document.words)}, every=1))
    return " ".join(question.words), len(document.words), events


def draw_layers(axes: Any, kind: str, layers: int, labels: bool = True) -> None:
    """Draws layers from bottom to top, tokens from left to right, coloured by what a step does with them."""
    from matplotlib.patches import Rectangle

    below, above, suffix = KINDS[kind]
    for layer in range(layers):
        left = 0.0
        for column, width in enumerate(WIDTHS):
            what = suffix if column else below if layer < BOUNDARY else above
            axes.add_patch(Rectangle((left, layer), width - 0.06, 0.88, facecolor=COLOURS[what], edgecolor="none"))
            left += width
    axes.axhline(BOUNDARY - 0.06, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, sum(WIDTHS)), ylim=(-0.1, layers + 0.1))
    middles = np.cumsum(WIDTHS) - np.asarray(WIDTHS) / 2
    axes.set_xticks(middles, ("prefix", "question", "response"), fontsize=8, color=DIM)
    axes.set_yticks(np.arange(layers) + 0.42, [str(layer) for layer in range(layers)] if labels else [""] * layers)
    axes.tick_params(length=0, labelsize=9, labelcolor=DIM)
    for side in axes.spines.values():
        side.set_visible(False)


def legend(figure: Any, kinds: tuple[str, ...], **place: Any) -> None:
    """What the colours mean."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=COLOURS[kind], label=WORDS[kind]) for kind in kinds]
    figure.legend(handles=handles, frameon=False, fontsize=9, labelcolor=INK, **place)


def draw_kinds(layers: int, path: Path) -> None:
    """Draws the three kinds of passes beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.9))
    places = figure.subplots(1, len(KINDS))
    for place, kind in zip(places, KINDS, strict=True):
        draw_layers(place, kind, layers, labels=place is places[0])
        place.set_title(TITLES[kind], fontsize=10, loc="left", color=INK)
    places[0].set_ylabel("layer", fontsize=9, color=DIM)
    edge = (sum(WIDTHS), BOUNDARY - 0.06)
    beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    places[-1].annotate("boundary b", edge, fontsize=9, **beside)
    legend(figure, tuple(COLOURS), loc="lower left", bbox_to_anchor=(0.05, -0.01), ncols=2)
    figure.subplots_adjust(left=0.06, right=0.9, top=0.92, bottom=0.23, wspace=0.08)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def animate(model: Model, question: str, prefix: int, events: list[Result], path: Path) -> None:
    """Draws a frame for the encoding and one for every step; plays twice, and stays on the last."""
    from PIL import Image

    first = Result(id="", token_ids=events[0].token_ids, masked=tuple(range(GEN_LENGTH)))
    before, frames = first, [_frame(model, "encode", question, prefix, first, first)]
    for event in events:
        kind = "reuse" if (event.steps - 1) % INTERVAL else "refresh"
        frames.append(_frame(model, kind, question, prefix, event, before))
        before = event
    images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    durations = [2200, *[1300] * (len(images) - 2), 4000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=2, quality=80, method=6)


def _frame(model: Model, kind: str, question: str, prefix: int, event: Result, before: Result) -> bytes:
    """One frame as PNG: the response above, the layers below."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, suffix = model.config.num_layers, len(question.split()) + GEN_LENGTH
    figure = Figure(figsize=(7.4, 5.2))
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 4.2))
    for position, token in enumerate(event.token_ids):
        masked, new = position in event.masked, position in before.masked
        colour = "#e4e4e7" if masked else COLOURS["computed"] if new else "#dbeafe"
        top.add_patch(Rectangle((position, 0), 0.94, 0.8, facecolor=colour))
        word = "" if masked else model.tokenizer.core.id_to_token(token)  # type: ignore[union-attr]
        top.text(position + 0.47, 0.4, word, ha="center", va="center", fontsize=10, color=INK)
    top.set(xlim=(0, GEN_LENGTH), ylim=(-0.1, 1.6))
    top.text(0, 1.12, f"“{question}?”, after a document of {prefix} words", fontsize=11, color=INK)
    top.axis("off")
    draw_layers(bottom, kind, layers)
    bottom.set_ylabel("layer", fontsize=9, color=DIM)
    whole = layers * (prefix + suffix)
    work = {
        "encode": BOUNDARY * prefix,  # and the keys and values of layer b, which is little
        "refresh": BOUNDARY * suffix + (layers - BOUNDARY) * (prefix + suffix),
        "reuse": layers * suffix,
    }[kind]
    title = "once, before all steps" if kind == "encode" else f"step {event.steps}: {kind}"
    note = f"computes {work / whole:.0%} of the tokens and layers that a step without a cache does"
    bottom.set_title(title, fontsize=11, loc="left", color=INK, weight="bold")
    bottom.set_title(note, fontsize=9, loc="right", color=DIM)
    legend(figure, ("computed", "alone", "kept"), loc="lower left", bbox_to_anchor=(0.06, 0.0))
    figure.subplots_adjust(left=0.075, right=0.985, top=0.99, bottom=0.2, hspace=0.22)
    out = io.BytesIO()
    figure.savefig(out, dpi=100, facecolor="white")
    return out.getvalue()


def draw_similarity(path: Path) -> None:
    """Draws how alike the bundled model's prefixes are, alone and in the whole sequence, layer by layer."""
    from matplotlib.figure import Figure

    import bicache_jax

    source = Path(str(bicache_jax.__file__)).parent / "data" / "example" / "boundary_table.json"
    found = json.loads(source.read_text(encoding="utf-8"))
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for ratio, colour in (("25", "#fdba74"), ("40", "#fb923c"), ("60", "#c2410c"), ("90", "#431407")):
        axes.plot(found["similarity"][ratio], "o-", color=colour, label=f"r = {ratio} %", markersize=4)
    axes.axhline(found["threshold"], color=DIM, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("threshold", (0, found["threshold"]), xytext=(0, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="layer", ylabel="mean cosine similarity")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 0.0))
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
