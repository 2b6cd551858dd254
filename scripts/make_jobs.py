"""Draws the two jobs in `examples/` that gain most from a prefix cache.

`five_shot.jsonl`: a document, five questions about it with their answers, and one more question. Everything before the
last question is a prefix that sixteen requests share. `samples.jsonl`: a prompt and `"n"`, the number of samples. The
samples share the whole prompt.

python scripts/make_jobs.py examples
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax.example import task

DOCUMENTS, QUESTIONS, SHOTS, SAMPLES = 4, 16, 5, 16
PEOPLE, FACTS = 12, 4
GEN_LENGTH = 8


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description="Draws the few-shot and the sampling job.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    few, samples = [], []
    rng = np.random.default_rng([task.FIRST_HELD_OUT, 7])
    for number in range(1, DOCUMENTS + 1):
        document = task.draw_document(rng, PEOPLE, FACTS)
        picked = task.pick_questions(rng, document, SHOTS + QUESTIONS + 1)
        shots = [word for shot in picked[:SHOTS] for word in (*shot.words, *shot.answer, ".")]
        for index, question in enumerate(picked[SHOTS : SHOTS + QUESTIONS], 1):
            few.append(_line(f"document{number}-question{index}", (*document.words, *shots), question))
        samples.append(_line(f"document{number}", document.words, picked[-1]) | {"n": SAMPLES, "seed": number * 1000})
    for name, lines in {"five_shot": few, "samples": samples}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _line(name: str, before: tuple[str, ...], question: task.Question) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": " ".join((*before, *question.words)),
        "gen_length": GEN_LENGTH,
        "answer": question.accepted,
        "kind": question.kind,
    }


if __name__ == "__main__":
    main()
