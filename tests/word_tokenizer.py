"""A tokenizer of words for tiny models: token i is the word `wi`."""

from __future__ import annotations

from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

from bicache_jax.checkpoints.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}w2 {{ m.content }} w3 {% endfor %}{% if add_generation_prompt %}w4{% endif %}"


def word_tokenizer(size: int, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """The tokenizer of a vocabulary of `size` tokens, with a chat template that opens a message with w2."""
    core = Core(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(core, TEMPLATE, {}, eos_ids)
