"""Draws `examples/requests.jsonl`: questions about held-out documents, with prefix ratios from about 30 to 90 %.

python scripts/make_examples.py examples/requests.jsonl
python scripts/make_examples.py --choices examples/choices.jsonl

With `--choices` each question has answers of its kind about others beside its own, for `bicache score`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bicache_jax.cli.options import integer, integers
from bicache_jax.example import task

GEN_LENGTH = 16
# People and facts per person of each document: r grows with the document's length.
SHAPES = ((2, 1), (2, 2), (3, 2), (4, 2), (6, 2), (6, 3), (8, 3), (12, 4))
QUESTIONS = 10
MOST_CHOICES = 4


def choices_of(rng: np.random.Generator, document: task.Document, question: task.Question) -> list[str]:
    """The answer among wrong ones of the same length, which are right for questions of the same kind."""
    right = " ".join(question.answer)
    others = [
        " ".join(other.answer)
        for other in document.questions()
        if other.kind == question.kind and len(other.answer) == len(question.answer) and other.words != question.words
    ]
    wrong = [other for other in dict.fromkeys(others) if other != right]
    picked = [wrong[index] for index in rng.permutation(len(wrong))[: MOST_CHOICES - 1]]
    return sorted([right, *picked], key=lambda _: rng.random())


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description="Draws the example requests.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--choices", action="store_true", help="draw choices to score, of the longest documents")
    parser.add_argument(
        "--calibration",
        type=integer(1),
        nargs="?",
        const=10,
        metavar="N",
        help="draw calibration requests, N times as many (default: ten times)",
    )
    parser.add_argument("--shape", type=integers(1), metavar="P,F", help="only documents of P people with F facts each")
    args = parser.parse_args()
    if args.shape is not None and len(args.shape) != 2:
        parser.error("--shape: two numbers, people and facts")
    seed, repeats = (task.CALIBRATION, args.calibration) if args.calibration else (task.FIRST_HELD_OUT, 1)
    rng = np.random.default_rng([seed, 3])
    lines = []
    shapes = (args.shape,) if args.shape is not None else SHAPES[-3:] if args.choices else SHAPES
    for index, (people, facts) in enumerate(shapes * repeats):
        document = task.draw_document(rng, people, facts)
        for number, question in enumerate(task.pick_questions(rng, document, QUESTIONS)):
            record: dict[str, Any] = {
                "id": f"document{index + 1}-question{number + 1}",
                "messages": [
                    {"role": "system", "content": " ".join(document.words)},
                    {"role": "user", "content": " ".join(question.words)},
                ],
                "gen_length": GEN_LENGTH,
                "answer": question.accepted,
                "kind": question.kind,
            }
            if args.choices:
                choices = choices_of(rng, document, question)
                if len(choices) == 1:
                    continue
                right = choices.index(" ".join(question.answer))
                del record["gen_length"]
                record |= {"choices": choices, "answer": right}
            lines.append(json.dumps(record) + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
