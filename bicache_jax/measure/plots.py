"""Plots of measurements; matplotlib is imported when a plot is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax.core.boundary import BoundaryTable

_SETTINGS = {
    "prefix": "prefix tokens P",
    "rows": "rows",
    "prefixes": "prefixes that the rows share",
    "refresh_interval": "refresh interval N",
    "suffix": "suffix tokens U",
    "boundary": "boundary b",
}


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def similarity_heat_map(table: BoundaryTable, path: Path) -> None:
    """Draws similarity by layer and prefix ratio, the threshold's contour, and the chosen boundaries.

    Args:
        table: a table with measurements.
        path: PNG file.

    Raises:
        ValueError: the table has no measurements.
    """
    if table.similarity is None:
        raise ValueError("the table holds no similarities")
    ratios = sorted(table.similarity)
    values = np.asarray([table.similarity[ratio] for ratio in ratios]).T
    figure, axes = _axes(7.0, 4.2)
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
    figure.savefig(path, dpi=110)


def speed_over_settings(record: dict[str, Any], path: Path | str) -> None:
    """Draws tokens/s, the speed-up over no cache and its limit against the setting that varies most.

    Args:
        record: the output of `bicache benchmark --json`.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    results = record["results"]
    across = max(_SETTINGS, key=lambda name: len({result[name] for result in results}))
    others = [name for name in _SETTINGS if name not in (across, "boundary")]
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
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
    figure.savefig(path, dpi=110)


def growth(record: dict[str, Any], across: str, path: Path | str) -> None:
    """Draws tokens/s, with the limit, and memory against one setting.

    Args:
        record: the output of `scripts/benchmark_sweep.py`.
        across: the setting, a key of `record["sweeps"]`.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    results = record["sweeps"][across]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
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
    figure.savefig(path, dpi=110)
