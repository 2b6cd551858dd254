from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bicache_jax.checkpoints.tokenizer import load_tokenizer
from bicache_jax.core.types import HOLE, BicacheError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}\n"
    "{% if add_generation_prompt %}\nassistant:{% endif %}"
)


def _folder(tmp_path: Path, **settings: object) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        ["user: hello there\nassistant: hello"],
        trainers.BpeTrainer(
            special_tokens=["<s>", "</s>", "<|eot_id|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.decoder = decoders.ByteLevel()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_text_and_templates(tmp_path: Path) -> None:
    folder = _folder(tmp_path, chat_template=TEMPLATE, bos_token={"content": "<s>"}, eos_token="</s>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.eos_ids == (1, 2)
    messages = [{"role": "user", "content": "hello"}]
    assert (
        tokenizer.chat_text(messages) == "<s>user:hello;assistant:"
    )  # no newline behind a block, as transformers renders
    ids = tokenizer.chat_ids(messages)
    assert ids[0] == 0 and ids.count(0) == 1  # the template's special token, once
    assert ids[: len(tokenizer.chat_ids(messages, generate=False))] == tokenizer.chat_ids(messages, generate=False)


@pytest.mark.parametrize("named", [False, True])
def test_templates_in_a_list_or_a_file(tmp_path: Path, named: bool) -> None:
    template = [{"name": "tools", "template": "x"}, {"name": "default", "template": "d"}] if named else None
    folder = _folder(tmp_path, chat_template=template)
    if not named:
        (folder / "chat_template.jinja").write_text("d")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.chat_text([{"role": "user", "content": "a"}]) == "d"


def test_templates_cannot_reach_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path, chat_template="{{ messages.__class__.__mro__ }}"))
    assert tokenizer is not None
    with pytest.raises(ValueError, match="refuses"):
        tokenizer.chat_text([{"role": "user", "content": "a"}])


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    whole = Tokenizer.from_file(str(_folder(tmp_path) / "tokenizer.json"))
    whole.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    added = {"300": {"content": "<|im_end|>", "special": True}}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("hello  there, ünïcode 42<|im_end|>")
    assert ids[-1] == tokenizer.eos_ids[0]
    assert tokenizer.decode(ids) == "hello  there, ünïcode 42"


def test_added_tokens_keep_the_ids_that_the_files_name(tmp_path: Path) -> None:
    """The layout of DiffuCoder's checkpoints: added tokens and special ones in files of their own, and a gap."""
    whole = Tokenizer.from_file(str(_folder(tmp_path) / "tokenizer.json"))
    whole.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    size = whole.get_vocab_size()
    added = {"<|im_end|>": size, "<|mask|>": size + 9, "<tool>": size + 4}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|mask|>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.eos_ids[0] == size
    assert {token: tokenizer.core.token_to_id(token) for token in added} == added
    ids = tokenizer.chat_ids([{"role": "user", "content": "hello<|mask|><tool>there"}])
    assert ids[0] == size and {size + 4, size + 9} <= set(ids)
    assert tokenizer.decode(ids) == "hello<tool>there"  # what is special is left out, and no more
    for bad in ('{"a": "x"}', '{"a": null}', "[1]"):
        (tmp_path / "added_tokens.json").write_text(bad)
        with pytest.raises(BicacheError, match=r"added_tokens\.json"):
            load_tokenizer(tmp_path)


def test_templates_find_what_transformers_gives_them(tmp_path: Path) -> None:
    source = "{% if tools is not none or documents %}no{% endif %}{% generation %}{{ messages[0] | tojson }}"
    tokenizer = load_tokenizer(_folder(tmp_path, chat_template=source + "{% endgeneration %}!"))
    assert tokenizer is not None
    assert tokenizer.chat_text([{"role": "user", "content": "ü"}]) == '{"role": "user", "content": "ü"}!'


def test_a_canvas_shows_its_holes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path))
    assert tokenizer is not None
    mask = 10_000
    ids = [mask, *tokenizer.encode("hello"), mask, mask, *tokenizer.encode(" there"), mask]
    assert tokenizer.canvas(ids, mask) == f"{HOLE}hello{HOLE * 2} there{HOLE}"
    assert tokenizer.canvas(tokenizer.encode("hello there"), mask) == "hello there"
    euro = tokenizer.encode("\u20ac")  # three tokens of one byte each
    assert len(euro) == 3 and HOLE in tokenizer.canvas([euro[0], mask, euro[2]], mask)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert dataclasses.replace(tokenizer, core=words).canvas([0, mask, 1], mask) == f"a{HOLE} b"


def test_no_files_and_bad_files(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BicacheError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BicacheError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
