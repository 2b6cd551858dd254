"""The notebooks: as their sources say, small, without faults, and running from start to end with the bundled model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import run_notebooks  # noqa: E402

if not (ROOT / "notebooks").is_dir():
    pytest.skip("an unpacked sdist has no notebooks", allow_module_level=True)


@pytest.mark.parametrize("name", run_notebooks.NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries that read notebooks
def test_notebooks_are_their_sources_run_whole(name):
    import nbformat

    file = ROOT / "notebooks" / f"{name}.ipynb"
    saved, source = nbformat.read(file, as_version=4), run_notebooks.build(name)
    assert [(cell.id, cell.cell_type, cell.source) for cell in saved.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in source.cells
    ], "python scripts/run_notebooks.py makes notebooks from their sources"
    assert file.stat().st_size < 150_000
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert str(Path.home()) not in file.read_text() and "Traceback" not in file.read_text()
    assert saved.cells[0].source.startswith("[![Open in Colab]") and "@param" in code[0].source


def test_the_folder_holds_the_notebooks_that_are_run():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(run_notebooks.NAMES)


@pytest.mark.slow
def test_notebooks_run_from_start_to_end():
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(name in done.stderr for name in run_notebooks.NAMES)
