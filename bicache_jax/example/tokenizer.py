"""Tokenizer files of the example models: one token per word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from bicache_jax.example import task

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] | trim }}{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
)


def write_tokenizer(folder: Path, token_id: Mapping[str, int] = task.TOKEN_ID) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    The chat template concatenates the messages: the document is the system message, the question the user message.

    Args:
        folder: the folder to write to.
        token_id: words and their ids.
    """
    core = tokenizers.Tokenizer(models.WordLevel(dict(token_id), unk_token=task.UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # separates words by spaces: no word begins with ##
    core.add_special_tokens([task.PAD, task.EOS, task.MASK, task.UNKNOWN])
    core.save(str(folder / "tokenizer.json"))
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": task.EOS,
        "mask_token": task.MASK,
        "pad_token": task.PAD,
        "unk_token": task.UNKNOWN,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
