"""The bundled model's task, its training data, and what ships with it."""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import load_model
from bicache_jax.core.boundary import load_table
from bicache_jax.example import task
from bicache_jax.serving.answers import accepted

ROOT = Path(__file__).parents[2]
DATA = ROOT / "bicache_jax" / "data" / "example"


def _facts(words: list[str]) -> list[tuple[str, str, str]]:
    """(person, verb, value) of a document, read from its text alone."""
    statements = " ".join(words).replace("lives in", "lives").split(" . ")
    return [(s.split()[0], s.split()[1], s.split()[2]) for s in statements]


def test_answers_follow_from_the_text() -> None:
    records = list(task.draw_requests(task.FIRST_HELD_OUT + 1, 300))
    assert {record["kind"] for record in records} == set(task.KINDS)
    verbs = {"live": "lives", "drink": "drinks", "play": "plays", "keep": "keeps"}
    nouns = {"town": "lives", "drink": "drinks", "game": "plays", "pet": "keeps"}
    order = list(nouns.values())
    for record in records:
        words = record["prompt"].split()
        facts, asked = _facts(words[: record["prefix_len"]]), words[record["prefix_len"] :]
        holders = [p for p, verb, value in facts if (verb, value) == (asked[1], asked[-1])]
        if record["kind"] == "forward":
            person, verb = asked[asked.index("does") + 1 : asked.index("does") + 3]
            wanted = [value for p, v, value in facts if (p, v) == (person, verbs[verb])]
        elif record["kind"] == "about":
            wanted = [value for v in order for p, verb, value in facts if (p, verb) == (asked[2], v)]
        elif record["kind"] == "joined":
            (person,) = [p for p, _, value in facts if value == asked[-1]]
            verb = nouns[asked[2]]
            (value,) = [value for p, v, value in facts if (p, v) == (person, verb)]
            wanted = [person, verb, *["in"] * (verb == "lives"), value]
        else:
            wanted = holders
            assert (len(holders) > 1) == (record["kind"] == "list")
        if record["kind"] == "list":
            assert sorted(record["answer"]) == sorted(map(" ".join, itertools.permutations(wanted))), record
        else:
            assert record["answer"].split() == wanted, record


def test_questions_are_fresh_with_every_seed_and_the_same_with_one() -> None:
    first, again, other = (list(task.draw_requests(seed, 40)) for seed in (20_000, 20_000, 20_001))
    assert first == again
    assert not {r["prompt"] for r in first} & {r["prompt"] for r in other}
    assert all(set(" ".join([r["prompt"], *accepted(r["answer"])]).split()) <= set(task.VOCABULARY) for r in first)
    for record in first:
        assert len(record["prompt"].split()) <= 300


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> object:
    pytest.importorskip("optax")
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import train_example

    return train_example


@pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="an installed package has no scripts")
def test_only_answers_are_masked_and_a_step_has_the_same_batch_after_a_restart(training) -> None:
    for lesson in training.LESSONS:
        ids, targets, counts, visible = training.draw_batch(3, 7, lesson)
        valid = visible[:, 0]
        assert ids.shape == (lesson.batch, lesson.length) and (ids[counts] == training.MASK).all()
        assert (targets[counts] != training.MASK).all() and counts.any() and not (counts & ~valid).any()
        assert (ids[~counts] == targets[~counts]).all()
        persons = {task.TOKEN_ID[name] for name in task.NAMES}
        assert not any(ids[row, 0] not in persons for row in range(lesson.batch))  # documents come first, and whole
    lesson = training.LESSONS[0]
    stream = training.drawn_ahead(partial(training.draw_batch, 3, lesson=lesson), 5)
    for step in (5, 6):
        for found, wanted in zip(next(stream), training.draw_batch(3, step, lesson), strict=True):
            np.testing.assert_array_equal(found, wanted)
    stream.close()


@pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="an installed package has no scripts")
def test_the_state_of_training_survives_its_file(training, tmp_path: Path) -> None:
    tree = ({"a": np.arange(3.0), "b": np.ones((2, 2))}, [np.zeros(())])
    state = {"step": 7, "lesson": 1, "lesson_step": 3, "seconds": 1.5}
    training.save_checkpoint(tmp_path, tree, state)
    blank = ({"a": np.zeros(3), "b": np.zeros((2, 2))}, [np.ones(())])
    found, found_state = training.load_checkpoint(tmp_path, blank)
    assert found_state == state
    np.testing.assert_array_equal(found[0]["a"], tree[0]["a"])
    np.testing.assert_array_equal(found[0]["b"], tree[0]["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.safetensors"]


@pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="an installed package has no scripts")
def test_a_training_is_not_begun_over_another_nor_on_what_is_held_out(
    training, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fault(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_example.py", "--output", str(tmp_path), *flags])
        with pytest.raises(SystemExit):
            training.main()
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no training.safetensors for --resume" in fault("--resume")
    assert "must be an integer from 0 to 4999" in fault("--seed", str(task.FIRST_HELD_OUT))
    (tmp_path / training.STATE).write_bytes(b"")
    assert "holds a training: continue it with --resume" in fault()
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in (50, 100, 150)))
    training.keep_log(log, 100)
    assert log.read_text() == '{"step": 50}\n{"step": 100}\n'


@pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="an installed package has no scripts")
def test_training_fits_the_library(training) -> None:
    params = load_model("example").params
    assert jax.tree.structure(params) == jax.tree.structure(training.structured_start(training.CONFIG, 1))
    loss = jax.eval_shape(training.loss_of, params, training.draw_batch(1, 0, training.LESSONS[-1]))
    assert loss.shape == () and loss.dtype == jnp.float32


def test_what_ships_belongs_together() -> None:
    model = load_model("example")
    table = load_table(DATA / "boundary_table.json")
    assert table.fingerprint == model.fingerprint and model.boundaries == table.table and not model.note
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 8 * 2**20
    tokenizer = json.loads((DATA / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == task.TOKEN_ID
    files = [ROOT / "examples" / name for name in ("requests.jsonl", "choices.jsonl")]
    for line in [line for file in files for line in file.read_text().splitlines()]:
        record = json.loads(line)
        words = " ".join(message["content"] for message in record["messages"])
        words = " ".join([words, *record.get("choices", accepted(record["answer"]))])
        assert set(words.split()) <= set(task.VOCABULARY)
