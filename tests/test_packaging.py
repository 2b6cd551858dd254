"""What is shipped: one package, whole, that works away from the checkout and leaves its host's settings alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import families
import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("models", "kernels", "configs")


def sources() -> list[Path]:
    """Every Python file of the project, under the folder it really is in."""
    folders = [ROOT / name for name in ("bicache_jax", *LINKED, "scripts", "tests")]
    return [
        Path(folder) / name
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if name.endswith(".py")
    ]


def imports(path: Path) -> list[str]:
    """The modules that a file imports, as far as `from package import module` shows them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return found


def clean_environment() -> dict[str, str]:
    """The environment without the paths and settings of this test run."""
    ours = ("PYTHON", "PYTEST", "VIRTUAL", "JAX", "XLA")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist)."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment that holds the wheel, what it needs, and nothing else."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    env = clean_environment()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, env=env)
    install = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*install, str(built[1])], check=True, env=env)
    return venv


def test_links_are_relative_and_point_into_the_checkout():
    if not (ROOT / "models").exists():
        pytest.skip("an unpacked sdist has folders in their place")
    for name in LINKED:
        assert os.readlink(ROOT / "bicache_jax" / name) == f"../{name}"
        assert (ROOT / name / "__init__.py").is_file()


def test_wheel_holds_the_package_and_nothing_else(built):
    shipped = set(zipfile.ZipFile(built[1]).namelist())
    metadata = {name for name in shipped if name.split("/")[0].endswith(".dist-info")}
    present = {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "bicache_jax", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert shipped - metadata == present
    assert {name.split("/", 1)[1] for name in metadata} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    for name in LINKED:
        assert f"bicache_jax/{name}/__init__.py" in shipped
    assert "bicache_jax/py.typed" in shipped
    assert "bicache_jax/data/example/config.json" in shipped


def test_sdist_can_be_tested_and_has_no_file_twice(built):
    with tarfile.open(built[0]) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "tests/test_packaging.py", "examples/requests.jsonl", ".ci/run"} <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"} <= names
    for folder in ("docs", "examples", "notebooks", "scripts", "tests"):  # whole, as far as they are kept at all
        listed = subprocess.run(["git", "ls-files", folder], capture_output=True, text=True, cwd=ROOT)
        assert listed.returncode or set(listed.stdout.split("\n")) - {""} <= names
    assert {name.split("/")[0] for name in names}.isdisjoint(LINKED)


def test_no_bare_imports_of_the_linked_folders():
    for path in sources():
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in (*LINKED, ""), f"{path} imports {name}: say bicache_jax.{name.lstrip('.')}"


def test_import_changes_no_setting_of_jax_and_makes_no_array():
    code = """
import jax
before = dict(jax.config.values)
import bicache_jax, bicache_jax.cli, bicache_jax.serving.engine, bicache_jax.loading
import bicache_jax.models, bicache_jax.kernels
after = dict(jax.config.values)
assert before == after, {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}
assert not jax.config.jax_enable_x64
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing the package has started a backend"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "checker",
    ["mypy", pytest.param("pyright", marks=pytest.mark.full)],  # pyright fetches itself from npm
)
def test_the_public_types_pass_strict_checkers(installed, tmp_path, checker):
    pytest.importorskip(checker, reason=f"{checker} is not installed: pip install {checker}")
    app = shutil.copy(ROOT / "tests" / "consumer" / "app.py", tmp_path)
    python = str(installed / "bin" / "python")
    command = {
        "mypy": ["--strict", "--python-executable", python, "--cache-dir", str(tmp_path / "cache"), app],
        "pyright": ["--pythonpath", python, "--project", str(tmp_path)],
    }[checker]
    # jax's own functions are partly unknown to pyright; what must be known of ours, the program asserts.
    unknown = {f"reportUnknown{what}Type": False for what in ("Argument", "Lambda", "Member", "Variable")}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"} | unknown))
    done = subprocess.run(
        [sys.executable, "-m", checker, *command], capture_output=True, text=True, cwd=tmp_path, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_the_consumer_runs_on_the_wheel(installed, tmp_path):
    command = [str(installed / "bin" / "python"), str(ROOT / "tests" / "consumer" / "app.py")]
    env = clean_environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "Oslo" in done.stdout


@pytest.mark.slow
def test_wheel_does_the_main_job_in_an_empty_environment(installed, tmp_path):
    venv, env = installed, clean_environment()
    python, command = venv / "bin" / "python", venv / "bin" / "bicache"
    requests = tmp_path / "requests.jsonl"
    lines = (ROOT / "examples" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    requests.write_bytes(b"".join(lines[:16]))
    job = [str(command), "generate", "--model", "example", "--input", requests.name, "--output", "out.jsonl"]
    done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["id"] for result in results] == [
        json.loads(line)["id"] for line in requests.read_text(encoding="utf-8").splitlines()
    ]
    assert any(result["prefix_len"] for result in results)
    accuracy = re.search(r"accuracy ([\d.]+)", done.stderr)
    assert accuracy is not None and float(accuracy[1]) > 0.8 and "tokens/s" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    where = "import bicache_jax; print(bicache_jax.__file__)"
    found = subprocess.run([str(python), "-c", where], capture_output=True, text=True, cwd=tmp_path, env=env).stdout
    assert found.startswith(str(venv))
    for name, case in {
        "llada2": "static_P1_g24_b8_s3/0",
        "a2d-qwen3": "bd3lm_g24_b8_s24/0",
    }.items():
        folder, wanted = families.FOLDERS[name], next(one for one in families.cases(name) if one.request.id == case)
        asked = wanted.request.sampling
        requests.write_text(json.dumps({"prompt_ids": wanted.request.prompt_ids}) + "\n")
        job = [str(command), "generate", "--model", str(folder), "--input", requests.name, "--output", f"{name}.jsonl"]
        job += ["--mask-id", f"{families.recorded(name)['mask_token_id']}", "--gen-length", f"{asked.gen_length}"]
        job += ["--block-length", f"{asked.block_length}", "--remasking", asked.remasking or "low_confidence"]
        job += ["--steps", f"{asked.steps}"] if asked.steps else ["--steps-per-block", f"{asked.steps_per_block}"]
        job += ["--block-causal"] * (name == "a2d-qwen3")
        done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        (line,) = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert wanted.agrees(tuple(json.loads(line)["token_ids"])), name


def test_every_file_names_the_same_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_actions_are_pinned_by_commit():
    used = [
        line.split("uses:")[1].strip()
        for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
