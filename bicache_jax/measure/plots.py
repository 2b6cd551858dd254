"""Plots of measurements, as matplotlib figures; matplotlib is imported when a plot is drawn.

A notebook shows a figure that a cell ends with; `figure.savefig(path, dpi=110)` writes it to a file.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bicache_jax.core.boundary import BoundaryTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is an extra

DPI = 110

_SETTINGS = {
    "prefix": "prefix tokens P",
    "rows": "rows",
    "prefixes": "prefixes that the rows share",
    "refresh_interval": "refresh interval N",
    "suffix": "suffix tokens U",
    "boundary": "boundary b",
}


@functools.cache
def _picture() -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    class Picture(Figure):
        """A figure that notebooks show as it is, whether or not pyplot has been imported."""

        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, format="png", dpi=DPI, metadata={"Software": None})
            return written.getvalue()

    return Picture


def _figure(width: float, height: float) -> Any:
    return _picture()(figsize=(width, height), layout="constrained")


def similarity_heat_map(table: BoundaryTable) -> Figure:
    """Draws similarity by layer and prefix ratio, the threshold's contour, and the chosen boundaries.

    Args:
        table: a table with measurements.

    Raises:
        ValueError: the table has no measurements.
    """
    if table.similarity is None:
        raise ValueError("the table holds no similarities")
    ratios = sorted(table.similarity)
    values = np.asarray([table.similarity[ratio] for ratio in ratios]).T
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    columns = np.arange(len(ratios))
    image = axes.pcolormesh(columns, np.arange(table.num_layers), values, cmap="viridis", vmax=1.0, shading="nearest")
    figure.colorbar(image, ax=axes, label="mean cosine similarity")
    if len(ratios) > 1 and values.min() < table.threshold < values.max():
        contour = axes.contour(columns, np.arange(table.num_layers), values, [table.threshold], colors="white")
        axes.clabel(contour, fmt=f"{table.threshold:g}")
    chosen = np.asarray([table.table[ratio] for ratio in ratios])
    axes.step(columns, chosen - 0.5, where="mid", color="tab:red", linewidth=2, label="boundary b(r)")
    axes.set_xticks(columns, [str(ratio) for ratio in ratios])
    axes.set(xlabel="prefix ratio r, %", ylabel="layer", ylim=(-0.5, table.num_layers))
    axes.set_title(f"Prefix KV alone and in the full sequence: {table.model}")
    axes.legend(loc="lower right")
    return figure


def speed_over_settings(record: dict[str, Any]) -> Figure:
    """Draws tokens/s, the speed-up over no cache and its limit against the setting that varies most.

    Args:
        record: the output of `bicache benchmark --json`.
    """
    results = record["results"]
    across = max(_SETTINGS, key=lambda name: len({result[name] for result in results}))
    others = [name for name in _SETTINGS if name not in (across, "boundary")]
    figure = _figure(9.0, 4.0)
    speed, ratio = figure.subplots(1, 2)
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        lines.setdefault((result["policy"], *(result[name] for name in others)), []).append(result)
    varied = [name for name in others if len({result[name] for result in results}) > 1]
    for (policy, *_), members in lines.items():
        members = sorted(members, key=lambda result: result[across] or 0)
        label = ", ".join([policy, *(f"{name} {members[0][name]}" for name in varied)])
        places = [result[across] or 0 for result in members]
        (drawn,) = speed.plot(places, [result["tokens_per_s"] for result in members], marker="o", label=label)
        if all(result["ratio_to_none"] for result in members):
            ratio.plot(places, [r["ratio_to_none"] for r in members], marker="o", color=drawn.get_color(), label=label)
        if policy != "none" and all(result["limit"] for result in members):
            ratio.plot(places, [r["limit"] for r in members], linestyle="--", color=drawn.get_color(), alpha=0.6)
    speed.set(xlabel=_SETTINGS[across], ylabel="tokens/s", ylim=(0, None))
    ratio.set(xlabel=_SETTINGS[across], ylabel="ratio to none (dashed: limit by counted operations)", ylim=(0, None))
    speed.legend(fontsize="small")
    figure.suptitle(f"{record['model']}, {record['dtype']}, {record['device']}", fontsize="medium")
    return figure


def growth(record: dict[str, Any], across: str) -> Figure:
    """Draws tokens/s, with the limit, and memory against one setting.

    Args:
        record: the output of `scripts/benchmark_sweep.py`.
        across: the setting, a key of `record["sweeps"]`.
    """
    results = record["sweeps"][across]
    figure = _figure(9.0, 3.6)
    speed, memory = figure.subplots(1, 2)
    places = sorted({result[across] for result in results})
    none = {result[across]: result for result in results if result["policy"] == "none"}
    for policy in dict.fromkeys(result["policy"] for result in results):
        lines = {result[across]: result for result in results if result["policy"] == policy}
        found = [lines.get(place) or next(iter(lines.values())) for place in places]  # `none` does not use N
        (drawn,) = speed.plot(places, [result["tokens_per_s"] for result in found], marker="o", label=policy)
        memory.plot(places, [result["memory_bytes"] / 2**20 for result in found], marker="o", label=policy)
        if policy != "none":
            slowest = [none.get(place) or next(iter(none.values())) for place in places]
            limit = [result["limit"] * base["tokens_per_s"] for result, base in zip(found, slowest, strict=True)]
            speed.plot(places, limit, linestyle="--", color=drawn.get_color(), alpha=0.6, label="limit: none x flops")
            if across == "prefix":
                for place, result in zip(places, found, strict=True):
                    speed.annotate(
                        f"r {result['ratio']} %",
                        (place, result["tokens_per_s"]),
                        xytext=(0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize="x-small",
                    )
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
    speed.set(xlabel=_SETTINGS[across], ylabel="tokens/s", ylim=(0, None))
    memory.set(xlabel=_SETTINGS[across], ylabel="memory of the decode program, MiB", ylim=(0, 1.1 * memory.dataLim.y1))
    speed.legend(fontsize="small")
    fixed = ", ".join(f"{_SETTINGS[name]} {value}" for name, value in record["base"].items() if name != across)
    figure.suptitle(f"{record['model']}, {record['dtype']}, {record['device']}\n{fixed}", fontsize="small")
    return figure


def bars(values: Mapping[str, float], *, label: str, title: str = "") -> Figure:
    """Draws a bar with its number for each value.

    Args:
        values: numbers by name, the one that the others are compared with first.
        label: what they count, with their unit.
        title: of the picture.
    """
    figure = _figure(7.0, 0.5 * len(values) + 1.1)
    axes = figure.subplots()
    for place, value in enumerate(values.values()):
        axes.barh(place, value, color="tab:grey" if place == 0 else "tab:orange")
        axes.annotate(f"  {value:,.0f}" if value >= 100 else f"  {value:.3g}", (value, place), va="center")
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(xlabel=label, xlim=(0, 1.15 * max(values.values())))
    if title:
        axes.set_title(title, loc="left", fontsize="medium")
    return figure


BANDS = ((0, 49), (50, 69), (70, 79), (80, 89), (90, 100))


def bands(by_ratio: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Merges ranges of ten percent into a few ranges with enough questions each."""
    joined = {}
    for low, high in BANDS:
        members = [group for label, group in by_ratio.items() if low <= int(label.split("-")[0]) <= high]
        samples = sum(group["samples"] for group in members)
        if samples:
            right = sum(group["exact_match"] * group["samples"] for group in members)
            joined[f"{low}-{high}"] = {"exact_match": right / samples, "samples": samples}
    return joined


def accuracy_over_boundaries(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws accuracy against the boundary: a line for each range of r on the left, for each kind on the right.

    Args:
        rows: what `bicache_jax.measure.by_boundary.accuracy_by_boundary` returns.
    """
    figure = _figure(9.0, 3.6)
    panels = zip(figure.subplots(1, 2, sharey=True), ("by_ratio", "by_kind"), ("r, %", "kind"), strict=True)
    rows = [{**row, "by_ratio": bands(row["by_ratio"])} for row in rows]
    for axes, field, title in panels:
        for label in rows[0][field]:
            values = [row[field][label]["exact_match"] for row in rows]
            count = rows[0][field][label]["samples"]
            axes.plot([row["boundary"] for row in rows], values, marker="o", label=f"{label} ({count})")
        axes.plot([row["boundary"] for row in rows], [row["exact_match"] for row in rows], color="black", label="all")
        axes.set(xlabel="boundary b (L: naive prefix cache)", ylim=(0, 1.03))
        axes.legend(title=title, fontsize="x-small", title_fontsize="x-small", ncols=2, loc="lower left")
    figure.axes[0].set_ylabel("exact match")
    return figure
