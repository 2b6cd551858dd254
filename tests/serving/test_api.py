"""The Python interface as people type it: what may be asked, what a fault says, and what an engine does once."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
from typing import Any

import golden
import jax
import numpy as np
import pytest
from word_tokenizer import word_tokenizer

import bicache_jax
from bicache_jax import BicacheError, CacheConfig, Engine, Model, Request, Result, SamplingConfig, load_model
from bicache_jax.serving.admission import admit
from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.requests import Parser
from bicache_jax.serving.texts import read_text

TEXT = "w5 w6 w7"
IDS = (5, 6, 7)
MESSAGES = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w7"}]
EIGHT = SamplingConfig(gen_length=8, steps=4)


@pytest.fixture(scope="module")
def model() -> Model:
    loaded = load_model(golden.FOLDERS["llada"])
    return dataclasses.replace(loaded, tokenizer=word_tokenizer(loaded.config.vocab_size, loaded.config.eos_ids))


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    """Rows run one at a time: batches of other sizes would be other programs to compile."""
    return Engine(model, cache=CacheConfig(boundary=2, prefix_detection="messages"), sampling=EIGHT, batch_size=1)


@pytest.fixture(scope="module")
def answers(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Tokens of the text and of the conversation, asked as objects."""
    asked = [{"id": "text", "prompt": TEXT}, {"id": "chat", "messages": MESSAGES}]
    return {result.id: result.token_ids for result in engine.generate(asked)}


@pytest.mark.parametrize(
    "asked",
    [
        TEXT,
        {"prompt": TEXT},
        [TEXT],
        (TEXT,),
        list(IDS),
        IDS,
        np.asarray(IDS),
        [np.asarray(IDS)],
        np.asarray([IDS]),
        {"prompt_ids": np.asarray(IDS)},
        Request("1", IDS, sampling=EIGHT),
        [Request("1", IDS, sampling=EIGHT)],
    ],
    ids=lambda asked: type(asked).__name__,
)
def test_a_text_may_be_asked_in_any_form(engine: Engine, answers: dict[str, Any], asked: Any) -> None:
    (result,) = engine.generate(asked)
    assert (result.id, result.token_ids) == ("1", answers["text"])


def test_forms_mix_and_answers_keep_their_order(engine: Engine, answers: dict[str, Any]) -> None:
    earlier = Result("before", finish_reason="error", error="was bad")
    asked = (entry for entry in [TEXT, MESSAGES, Request("r", IDS, sampling=EIGHT), earlier, {"prompt": TEXT, "n": 2}])
    results = engine.generate(asked)
    assert [(result.id, result.sample) for result in results] == [
        ("1", 0), ("2", 0), ("r", 0), ("before", 0), ("5", 0), ("5", 1),
    ]  # fmt: skip
    assert [result.token_ids for result in results[:4]] == [answers["text"], answers["chat"], answers["text"], ()]
    assert results[1].chat and results[1].prompt_len == 8 and not results[0].chat
    assert engine.generate([]) == engine.generate(()) == []


def test_a_conversation_is_one_request(engine: Engine, answers: dict[str, Any]) -> None:
    for asked in (MESSAGES, [MESSAGES], tuple(MESSAGES), {"messages": MESSAGES}):
        (result,) = engine.generate(asked)
        assert result.token_ids == answers["chat"]
    assert engine.chat(MESSAGES).token_ids == answers["chat"]
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]
    assert engine.chat([{"role": "system", "content": parts}, MESSAGES[1]]).token_ids == answers["chat"]
    assert engine.chat("w7").token_ids == engine.chat([MESSAGES[1]]).token_ids


def test_settings_of_a_request_come_before_those_of_the_call_and_of_the_engine(engine: Engine) -> None:
    (own, plain) = engine.generate([{"prompt": TEXT, "steps": 2}, TEXT], sampling={"steps": 8})
    assert (own.steps, plain.steps) == (2, 8)
    (whole,) = engine.generate(TEXT, sampling=SamplingConfig(gen_length=8, steps=1))
    assert whole.steps == 1
    (request,) = engine.generate(Request("r", IDS, sampling=EIGHT), sampling={"steps": 8})
    assert request.steps == EIGHT.steps
    assert engine.chat(MESSAGES, sampling={"steps": 1}).steps == 1
    assert {result.steps for result in engine.stream(TEXT, sampling={"steps": 2}, partial=False)} == {2}
    assert [row.request.sampling.steps for row in engine.plan([TEXT, TEXT], sampling={"steps": 2}).rows] == [2, 2]


def test_requests_of_different_settings_share_a_call(engine: Engine) -> None:
    asked = [
        {"id": "a", "prompt": TEXT, "temperature": 0.9, "seed": 3},
        {"id": "b", "prompt": TEXT, "remasking": "entropy"},
        {"id": "c", "prompt": TEXT, "threshold": 0.4},
        {"id": "d", "prompt": TEXT, "top_k": 3, "top_p": 0.9, "temperature": 2, "alg_temperature": 0.5},
    ]
    together = engine.generate(asked)
    assert [result.token_ids for result in together] == [engine.generate(one)[0].token_ids for one in asked]
    assert len({result.token_ids for result in together}) >= 3


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (None, TypeError, ["requests must be", "got None"]),
        (5, TypeError, ["requests must be", "int 5"]),
        (b"w5", TypeError, ["requests must be", "bytes"]),
        ([TEXT, None], TypeError, [r"requests\[1\]: a request must be", "got None"]),
        ([TEXT, 2.5], TypeError, [r"requests\[1\]", "float 2.5"]),
        ([object()], TypeError, [r"requests\[0\]", "object"]),
        ([TEXT, {"prompt": TEXT, "gen_lenght": 8}], BicacheError, [r"requests\[1\]: 'gen_lenght'", "'gen_length'"]),
        ({"prompt": TEXT, "max_tokens": 8}, BicacheError, ["request: 'max_tokens'", "did you mean 'gen_length'"]),
        ({"prompt": 5}, BicacheError, ["'prompt' must be a string, got 5"]),
        ([[]], BicacheError, [r"requests\[0\]", "'messages' must be a non-empty list"]),
        ([["w5", "w6"]], BicacheError, [r"requests\[0\]", r"messages\[0\] is not"]),
        (Request("r", (5, 999)), BicacheError, ["request: token 999", "vocabulary"]),
        (Request("r", IDS, prefix_len=4), BicacheError, ["prefix_len"]),
        (Request("r", IDS, sampling=SamplingConfig(gen_length=4096)), BicacheError, ["exceed the model's 1024"]),
        ([Request("r", IDS), Request("r", IDS)], BicacheError, [r"requests\[1\]: id 'r'"]),
        ([{"id": "2", "prompt": TEXT}, TEXT], BicacheError, [r"requests\[1\]: id '2'"]),
        ([{}, 5, {}], BicacheError, [r"requests\[0\]", "exactly one", r"\(and 2 more of the 3 requests are faulty\)"]),
    ],
)
def test_faults_raise_before_anything_runs(engine: Engine, asked: Any, kind: type, words: list[str]) -> None:
    before = engine.stats
    for call in (engine.generate, engine.stream, engine.plan, engine.warmup):
        if asked is None and call == engine.warmup:
            continue
        with pytest.raises(kind, match=".*".join(words)) as caught:
            call(asked)
        assert caught.type is kind and "\n" not in str(caught.value)
    assert engine.stats == dataclasses.replace(before, compilations=engine.stats.compilations)


def test_faults_may_be_results(engine: Engine, answers: dict[str, Any]) -> None:
    asked = [{"id": "x", "prompt": TEXT, "tepm": 1}, TEXT, None, Request("r", (999,)), {"id": [], "prompt": TEXT}]
    results = engine.generate(asked, errors="return")
    assert [(result.id, result.finish_reason == "error") for result in results] == [
        ("x", True), ("2", False), ("3", True), ("r", True), ("5", True),
    ]  # fmt: skip
    assert results[1].token_ids == answers["text"]
    assert "requests[2]" in str(results[2].error) and "'tepm'" in str(results[0].error)
    with pytest.raises(TypeError, match="requests must be"):
        engine.generate(None, errors="return")
    with pytest.raises(ValueError, match="errors must be"):
        inspect.unwrap(admit)(TEXT, Parser(engine.model.config, None, EIGHT), errors="ignore")


@pytest.mark.parametrize(
    ("sampling", "kind", "word"),
    [
        ({"temprature": 1}, ValueError, "'temprature' .* did you mean 'temperature'"),
        ({"temperature": -1}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, ValueError, "'temperature' must be a finite number, got 'hot'"),
        ("greedy", TypeError, "sampling must be a SamplingConfig or a dict"),
        (0.5, TypeError, "sampling must be"),
    ],
)
def test_settings_that_are_none_say_so(engine: Engine, sampling: Any, kind: type, word: str) -> None:
    for call in (engine.generate, engine.stream, engine.chat, engine.plan):
        with pytest.raises(kind, match=word):
            call(TEXT, sampling=sampling)


@pytest.mark.full
def test_a_conversation_that_grows_finds_its_programs_compiled(model: Model) -> None:
    """Ten turns, eleven to three hundred tokens: it waits for the compiler at four of them, whatever it says."""
    engine = Engine(model, cache=CacheConfig(boundary=2), sampling=EIGHT)
    messages, compiled = [{"role": "system", "content": "w5 w6"}], []
    for turn in range(10):
        messages.append({"role": "user", "content": " ".join(f"w{20 + turn + word}" for word in range(12))})
        counter = CompileCounter()
        answer = engine.chat(messages)
        compiled.append(counter.count > 0)
        wanted = engine.generate({"messages": messages})[0] if turn in (1, 6) else answer
        assert answer == wanted and answer.prefix_len < answer.prompt_len
        messages.append({"role": "assistant", "content": " ".join(f"w{50 + turn + word}" for word in range(12))})
    assert sum(compiled) <= 4 and not any(compiled[-3:])


@pytest.mark.parametrize("messages", [None, 5, {"role": "user", "content": "w7"}, b"w7"])
def test_chat_takes_messages(engine: Engine, messages: Any) -> None:
    with pytest.raises(TypeError, match="messages must be a list"):
        engine.chat(messages)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"model": "./LLaDA"}, r"path './LLaDA': bicache_jax.load_model"),
        ({"model": None}, "model must be a Model"),
        ({"cache": {"policy": "none"}}, "cache must be a CacheConfig, got dict"),
        ({"sampling": {"steps": 3}}, "sampling must be a SamplingConfig"),
        ({"batch_size": 2.0}, "batch_size must be an integer, got float"),
        ({"batch_size": True}, "batch_size must be an integer, got bool"),
        ({"mesh": "data=2"}, "mesh must be a jax.sharding.Mesh"),
        ({"attention": None}, "attention must be one of auto"),
    ],
)
def test_arguments_of_an_engine_of_other_types(model: Model, arguments: dict[str, Any], word: str) -> None:
    make = inspect.unwrap(Engine.__init__)  # as a user has it, without the checker of the tests
    with pytest.raises(TypeError, match=word):
        make(object.__new__(Engine), **{"model": model, **arguments})


def test_requests_by_hand_say_what_is_wrong() -> None:
    make = inspect.unwrap(Request.__post_init__)
    for fields, word in (({"prompt_ids": "w5"}, "must be token ids"), ({"sampling": {}}, "must be a SamplingConfig")):
        request = copy.copy(Request("r", IDS))
        for name, value in fields.items():
            object.__setattr__(request, name, value)
        with pytest.raises(TypeError, match=word):
            make(request)


@pytest.mark.slow
def test_things_print_in_a_line_compare_and_have_hashes(model: Model, engine: Engine) -> None:
    (result,) = engine.generate(TEXT)
    request = Request("r", IDS)
    for thing in (model, engine, result, request, EIGHT, CacheConfig(table={0: 1}), Result("e", error="bad")):
        assert thing == thing and thing != 5 and isinstance(hash(thing), int)
        assert len(repr(thing)) < 600 and "\n" not in repr(thing)
    assert repr(model).startswith("Model(") and "6 layers" in repr(model) and "parameters" in repr(model)
    assert result == dataclasses.replace(result) and hash(result) == hash(dataclasses.replace(result))
    assert model != dataclasses.replace(model)
    assert CacheConfig(table={0: 1}) == CacheConfig(table={0: 1}) != CacheConfig(table={0: 2})


def test_progress_is_shown_where_it_is_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([TEXT, MESSAGES])
    assert capsys.readouterr().err == ""
    engine.generate([TEXT, MESSAGES], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_stop_strings_end_the_text(engine: Engine, answers: dict[str, Any]) -> None:
    words = [f"w{token}" for token in answers["text"]]
    place = next(place for place in range(2, 8) if words[place] not in " ".join(words[:place]))
    later = words[place + 1 :] or ["not there"]
    (result,) = engine.generate({"prompt": TEXT, "stop": [later[-1], f" {words[place]}", "not there"]})
    assert result.token_ids == answers["text"]
    assert result.text == " ".join(words[:place]) and result.finish_reason == "stop" and result.text_len == place + 1
    (whole,) = engine.generate({"prompt": TEXT, "stop": "not there"})
    assert whole.text == " ".join(words) and whole.finish_reason == "length" and whole.text_len == 8
    events = list(engine.stream({"prompt": TEXT, "stop": words[place]}))
    assert all(words[place] not in str(event.text).split() for event in events)


def test_a_text_ends_at_the_first_of_its_ends(model: Model) -> None:
    eos = model.config.eos_ids[0]
    read = lambda tokens, **more: read_text(  # noqa: E731
        tokens, Request("r", IDS, **more), model.config, model.tokenizer
    )
    assert dataclasses.astuple(read((5, 6, eos, 7))) == ("w5 w6", 2, True, ())
    assert dataclasses.astuple(read((5, 6, eos, 7), max_tokens=2)) == ("w5 w6", 2, False, ())
    assert dataclasses.astuple(read((5, 6, eos, 7), stop=("w6", "5 w6"))) == ("w", 2, True, ())
    assert dataclasses.astuple(read((5, 6, eos, 7), stop=("w7",))) == ("w5 w6", 2, True, ())
    assert read((5, model.config.mask_id, 8), stop=("w8",)).text == "w5\u2591 "


@pytest.mark.slow
def test_without_other_requests_for_a_prefix_company_does_not_matter(model: Model) -> None:
    shared = "w9 " * 40
    asked = [{"id": f"{i}", "prompt": f"{shared}w{20 + i} w{30 + i} w{50 + i}"} for i in range(3)]
    asked.append({"id": "chat", "messages": [{"role": "system", "content": shared}, MESSAGES[1]]})
    asked.append({"id": "given", "prompt": f"{shared}w60 w61", "prefix_len": 20})
    asked.append({"id": "samples", "prompt": f"{shared}w62", "n": 2})
    found = {}
    for detection in ("auto", "messages", "off"):
        cache = CacheConfig(boundary=2, prefix_detection=detection)
        engine = Engine(model, cache=cache, sampling=EIGHT, batch_size=1)
        lengths = lambda asked, engine=engine: {  # noqa: E731
            row.request.id: row.prefix_len for row in engine.plan(asked).rows
        }
        found[detection] = list(lengths(asked).values())
        alone = {name: size for one in asked for name, size in lengths(one).items()}
        assert (alone == lengths(asked)) == (detection != "auto")
        if detection == "messages":
            together = {result.id: result.token_ids for result in engine.generate([asked[0], asked[1], asked[3]])}
            assert all(engine.generate(one)[0].token_ids == together[one["id"]] for one in (asked[0], asked[3]))
    assert {name: sorted(lengths) for name, lengths in found.items()} == {
        "auto": [20, 40, 40, 40, 41, 42],
        "messages": [0, 0, 0, 20, 41, 42],
        "off": [0, 0, 0, 0, 0, 20],
    }


@pytest.mark.slow
@pytest.mark.parametrize("block_cache", ["off", "prefix"])
def test_after_a_warm_up_nothing_is_compiled(model: Model, block_cache: str) -> None:
    sampling = SamplingConfig(gen_length=16, steps=8, block_length=8)
    jax.clear_caches()  # another test may have compiled the same
    engine = Engine(model, cache=CacheConfig(boundary=3, block_cache=block_cache), sampling=sampling)  # type: ignore[arg-type]
    asked = [{"prompt_ids": [*range(10, 40), 50 + i], "prefix_len": 30} for i in range(2)]
    warmed = engine.warmup(asked)
    assert len(warmed.shapes) == 1 and warmed.seconds > 0 and engine.stats.rows == engine.stats.dispatches == 0
    assert warmed.compilations > 0
    before = engine.stats.compilations
    results = engine.generate(asked)
    assert engine.stats.compilations == before and engine.warmup(prompt_len=31, prefix_len=30, rows=2).compilations == 0
    assert all(model.config.mask_id not in result.token_ids for result in results)


def test_a_warm_up_is_of_requests_or_of_a_shape(engine: Engine) -> None:
    for arguments in ({}, {"requests": TEXT, "prompt_len": 5}):
        with pytest.raises(ValueError, match="either requests or a prompt_len"):
            engine.warmup(**arguments)


def test_the_version_is_known() -> None:
    assert bicache_jax.__version__ == "unknown" or bicache_jax.__version__[0].isdigit()
    assert "__version__" in dir(bicache_jax)


_CHILD = """
import os, sys
from pathlib import Path
import jax
import bicache_jax
from bicache_jax import CacheConfig, Engine, load_model, use_compilation_cache

folder, home = sys.argv[1], Path(os.environ["XDG_CACHE_HOME"])
setting = lambda: jax.config.jax_compilation_cache_dir
kept = lambda at: sum(1 for _ in Path(at).rglob("*-cache")) if Path(at).exists() else 0
model = load_model(folder)
assert setting() is None, "an import or a model started it"
engine = Engine(model, cache=CacheConfig(boundary=2))
ours = home / "bicache-jax" / "xla"
assert setting() == str(ours)
jax.jit(lambda x: x + 1)(1.0)
first = kept(ours)
assert first > 0
assert use_compilation_cache(False) is None and setting() is None
jax.jit(lambda x: x + 2)(1.0)
Engine(model, cache=CacheConfig(boundary=2))
assert setting() is None and kept(ours) == first, "it was turned off"
other = home / "other"
assert use_compilation_cache(other) == str(other)
jax.jit(lambda x: x + 3)(1.0)
assert kept(other) > 0 and kept(ours) == first
jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
assert use_compilation_cache() == use_compilation_cache(False) == str(home / "mine"), "what jax was given stays"
jax.config.update("jax_compilation_cache_dir", None)
os.environ["BICACHE_COMPILATION_CACHE"] = "off"
assert use_compilation_cache() is None
os.environ["BICACHE_COMPILATION_CACHE"] = str(home / "named")
assert use_compilation_cache() == str(home / "named")
try:
    use_compilation_cache(True)
except TypeError:
    print("fine")
"""


def test_compiled_programs_are_kept_unless_someone_says_otherwise(tmp_path: Any) -> None:
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    env = {name: value for name, value in env.items() if "PERSISTENT_CACHE" not in name}
    env |= {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", _CHILD, str(golden.FOLDERS["llada"])]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"
