"""Pictures of measurements; matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax.boundary import BoundaryTable


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def similarity_heat_map(table: BoundaryTable, path: Path) -> None:
    """Draws similarity by layer and prefix ratio, the threshold's contour, and the chosen boundaries.

    Args:
        table: a table with its measurements.
        path: PNG file.

    Raises:
        ValueError: the table holds no measurements.
    """
    if table.similarity is None:
        raise ValueError("the table holds no similarities")
    ratios = sorted(table.similarity)
    values = np.asarray([table.similarity[ratio] for ratio in ratios]).T
    figure, axes = _axes(7.0, 4.2)
    places = np.arange(len(ratios))
    image = axes.pcolormesh(places, np.arange(table.num_layers), values, cmap="viridis", vmax=1.0, shading="nearest")
    figure.colorbar(image, ax=axes, label="mean cosine similarity")
    if len(ratios) > 1 and values.min() < table.threshold < values.max():
        contour = axes.contour(places, np.arange(table.num_layers), values, [table.threshold], colors="white")
        axes.clabel(contour, fmt=f"{table.threshold:g}")
    chosen = np.asarray([table.table[ratio] for ratio in ratios])
    axes.step(places, chosen - 0.5, where="mid", color="tab:red", linewidth=2, label="boundary b(r)")
    axes.set_xticks(places, [str(ratio) for ratio in ratios])
    axes.set(xlabel="prefix ratio r, %", ylabel="layer", ylim=(-0.5, table.num_layers))
    axes.set_title(f"Prefix KV alone and in the full sequence: {table.model}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
