"""Makes the notebooks from their sources, and runs them.

A notebook's source is the Python file of the same name: cells in jupytext's percent format. What all notebooks have in
common, the badge and the cell that installs, is here. `--check` runs them with small settings and writes nothing.

python scripts/run_notebooks.py [--check] [NAME ...]
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
PICTURE, COLOURS = "image/png", 64
NAMES = ("watch_a_model_write", "one_document_many_questions", "is_bicache_safe_for_my_model")

REPOSITORY = ""
"""OWNER/NAME on GitHub, where Colab opens the notebooks from. Empty: not published yet, so the badge opens Colab's own
page, which takes a notebook by upload."""

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})\n\n"

SETUP = f"""\
RUNTIME = "CPU"  # @param ["CPU", "T4", "L4", "A100", "v5e-1"]
INSTALL = "bicache-jax"  # @param {{type:"string"}}
REPOSITORY = "{REPOSITORY}"
# RUNTIME: what "Runtime > Change runtime type" is set to.
# INSTALL: a name on PyPI, a folder or wheel, or git+https://...
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("bicache_jax") is None:
    extras = "[notebook,hub" + {{"CPU": "]", "v5e-1": ",tpu]"}}.get(RUNTIME, ",cuda]")
    wanted = f"bicache-jax{{extras}} @ {{INSTALL}}" if "://" in INSTALL else INSTALL + extras
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

"""

WIDGET = "application/vnd.jupyter.widget-view+json"

QUICK = "quick"
"""Tag of a cell with small settings: it is in the source, runs where notebooks are checked, and is in no notebook."""


def address(name: str) -> str:
    """Where a notebook's badge leads."""
    colab = "https://colab.research.google.com/"
    return f"{colab}github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb" if REPOSITORY else colab


def build(name: str, *, quick: bool = False) -> Any:
    """A notebook as its source says, without outputs.

    Args:
        name: its name.
        quick: with the cells of small settings.
    """
    import jupytext

    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    cells = [cell for cell in notebook.cells if quick or QUICK not in cell.metadata.get("tags", ())]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # a drawn one would differ from run to run
        cell.metadata = {}
    cells[0].source = BADGE.format(address=address(name)) + cells[0].source
    first = next(cell for cell in cells if cell.cell_type == "code")
    first.source = SETUP + first.source
    first.metadata = {"cellView": "form"}
    notebook.cells = cells
    notebook.metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: Any) -> None:
    """Runs a notebook from start to end, in its folder, and keeps what it shows.

    Raises:
        CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    os.environ["HF_HUB_OFFLINE"] = "1"  # what is saved and checked is made with the bundled model
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # the widget of a bar that is gone says nothing without its kernel
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            for output in cell.outputs:
                if PICTURE in output.get("data", {}):
                    output["data"][PICTURE] = smaller(output["data"][PICTURE])
    notebook.metadata.pop("widgets", None)


def smaller(picture: str) -> str:
    """A plot in few colours: a third of the bytes, and it looks the same."""
    from PIL import Image

    kept = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as whole:
        on_white = Image.new("RGB", whole.size, "white")
        on_white.paste(whole.convert("RGBA"), mask=whole.convert("RGBA"))
        on_white.quantize(COLOURS, dither=Image.Dither.NONE).save(kept, "PNG", optimize=True)
    return base64.b64encode(kept.getvalue()).decode() + "\n"


def main() -> None:
    """Runs the notebooks that are named, or all."""
    import nbformat

    parser = argparse.ArgumentParser(description="Makes the notebooks from their sources, and runs them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(NAMES)}")
    parser.add_argument("--check", action="store_true", help="run with small settings, write nothing")
    args = parser.parse_args()
    for name in args.names or NAMES:
        if name not in NAMES:
            parser.error(f"no notebook {name!r}; there are {', '.join(NAMES)}")
        begun = time.perf_counter()
        notebook = build(name, quick=args.check)
        execute(notebook)
        file = FOLDER / f"{name}.ipynb"
        if not args.check:
            nbformat.write(notebook, file)
        size = "" if args.check else f", {file.stat().st_size / 1000:.0f} kB"
        print(f"{name}: {time.perf_counter() - begun:.0f} s{size}", file=sys.stderr)


if __name__ == "__main__":
    main()
