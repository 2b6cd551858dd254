"""Templates: what a hole is, in words and in tokens, what is refused, and what results say of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import families
import golden
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors
from word_tokenizer import word_tokenizer

from bicache_jax import CacheConfig, Engine, Model, Request, Result, SamplingConfig, load_model
from bicache_jax.bulk.journal import journal_path
from bicache_jax.checkpoints.tokenizer import Tokenizer
from bicache_jax.cli import main
from bicache_jax.cli.outputs import FileOutput
from bicache_jax.core.types import Filled
from bicache_jax.serving.requests import Parser
from bicache_jax.serving.texts import read_text

FOLDER = golden.FOLDERS["llada"]
CONFIG = golden.model("llada")[0]
MASK = CONFIG.mask_id


def parse(record: dict[str, Any], tokenizer: Any = None, cache: CacheConfig | None = None, **sampling: Any) -> Request:
    tokenizer = tokenizer or word_tokenizer(CONFIG.vocab_size, (3,))
    parser = Parser(dataclasses.replace(CONFIG, eos_ids=(3,)), tokenizer, SamplingConfig(**sampling), cache or CACHE)
    return parser.parse(record, "a", 0)


CACHE = CacheConfig()


def fault(record: dict[str, Any], **changes: Any) -> str:
    parser = Parser(dataclasses.replace(CONFIG, **changes), word_tokenizer(CONFIG.vocab_size), SamplingConfig())
    (found,) = parser.lines([record], "in.jsonl")
    assert isinstance(found, Result) and found.error and "\n" not in found.error
    return found.error.removeprefix("in.jsonl, line 1: ")


def test_holes_come_from_words_lists_tokens_and_conversations() -> None:
    wanted = ((10, 20, 30, 40), ((2, 3), (6, 2)))
    found = [
        parse({"template": "w10 w20 {mask:3} w30 {mask:2} w40"}),
        parse({"template": ["w10 w20 ", 3, " w30 ", 2, " w40"]}),
        parse({"template_ids": [10, 20, *[MASK] * 3, 30, *[MASK] * 2, 40]}),
    ]
    for request in found:
        assert (request.prompt_ids, request.holes) == wanted and request.lead == 2
        assert request.sampling.gen_length == 5 and not request.trim
        assert request.canvas(MASK) == (10, 20, *[MASK] * 3, 30, *[MASK] * 2, 40)
    assert found[0].template == found[1].template == ("w10 w20 ", " w30 ", " w40") and found[2].template == ()
    messages = [{"role": "system", "content": "w50"}, {"role": "user", "content": "w60"}]
    asked = parse({"messages": [*messages, {"role": "assistant", "template": "w9 {mask:4}{mask:1}."}], "trim": True})
    whole = parse({"messages": messages})
    assert asked.prompt_ids == (*whole.prompt_ids, 9, 0) and asked.trim and asked.chat  # w0 is what the tokenizer lacks
    assert asked.holes == ((len(whole.prompt_ids) + 1, 4), (len(whole.prompt_ids) + 5, 1))
    assert asked.prefix_len == whole.prefix_len and asked.template == ("w9 ", "", ".")
    in_prompt = parse({"prompt_ids": [10, MASK, MASK, 20]})
    assert in_prompt.holes == () and in_prompt.lead == 4  # masks of a prompt are text


def test_braces_of_the_text_are_doubled() -> None:
    core = Core(models.WordLevel({"<unk>": 0, "{": 1, "}": 2, '"a"': 3, ":": 4, "{mask:3}": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    request = parse({"template": '{{ "a" : {mask:2} }} {{mask:3}}'}, Tokenizer(core, None, {}, ()))
    assert request.prompt_ids == (1, 3, 4, 2, 5) and request.template == ('{ "a" : ', " } {mask:3}")
    assert request.holes == ((3, 2),)


def test_special_tokens_are_put_around_the_whole_template() -> None:
    core = Core(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = Tokenizer(core, "{% for m in messages %}{{ m.content }}{% endfor %}", {}, ())
    assert parse({"prompt": "a b"}, tokenizer).prompt_ids == (1, 3, 4, 2)
    request = parse({"template": "a {mask:2} b {mask:1} a"}, tokenizer)
    assert request.prompt_ids == (1, 3, 4, 3, 2) and request.holes == ((2, 2), (5, 1))
    edges = parse({"template": "{mask:1}a{mask:1}"}, tokenizer)
    assert edges.prompt_ids == (1, 3, 2) and edges.holes == ((1, 1), (3, 1))
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "template": ["a", 2]}]
    chat = parse({"messages": messages}, tokenizer)
    assert chat.prompt_ids == (4, 3) and chat.holes == ((2, 2),)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"template": "w1 w2"}, "'template' has no hole: a hole is {mask:N}"),
        ({"template": "w1 {mask:0}"}, "must have at least 1 token, hole 1 has 0"),
        ({"template": ["w1", 2, -1]}, "must have at least 1 token, hole 2 has -1"),
        ({"template": "{mask:3}"}, "'template' has no tokens beside its holes"),
        ({"template": 'w1 {"a": {mask:3}}'}, "'{\"a\": {mask:3}}' at character 3: a hole is {mask:N}"),
        ({"template": "w1 {mask} w2"}, "a brace of the text is doubled: {{ or }}"),
        ({"template": "w1 {mask:3}}"}, "'}' at character 11"),
        ({"template": 5}, "must be a text, or a list of texts and lengths of holes, got 5"),
        ({"template": ["w1", 2.5]}, "must hold texts and lengths of holes, got 2.5"),
        ({"template": "w1 {mask:99999999999999999999}"}, "the holes of 'template' have 999999999999 tokens"),
        ({"template": "w1 {mask:5000}"}, "the holes of 'template' have 5000 tokens"),
        ({"template_ids": [1] * 60 + [MASK] * 8}, "the template's 68 tokens, those of its holes included, exceed"),
        ({"template": f"w1 w{MASK} {{mask:2}}"}, "the text of 'template' holds the model's mask token"),
        ({"template": "w1 {mask:2} \ud800"}, "'template' holds a lone surrogate"),
        ({"template_ids": [1, 2]}, f"'template_ids' has no hole: a hole is a run of the mask token, {MASK}"),
        ({"template_ids": [MASK]}, "'template_ids' has no tokens beside its holes"),
        ({"template_ids": [MASK, -1]}, "'template_ids' holds -1"),
        ({"template_ids": "x"}, "'template_ids' must be a list of integers"),
        ({"template": "w1 {mask:2}", "prompt": "w1"}, "must have exactly one of"),
        ({"template": "w1 {mask:2}", "gen_length": 2}, "a template takes no 'gen_length'"),
        ({"template": "w1 {mask:2} w2", "prefix_len": 2}, "'prefix_len' must be an integer from 0 to 1"),
        ({"template": "w1 {mask:2}", "trim": "yes"}, "'trim' must be true or false"),
        ({"prompt": "w1", "trim": True}, "'trim' is for templates"),
        ({"template": "w1 {mask:2}", "holes": [[1, 2]]}, "'holes' is not a key of a request"),
        ({"messages": [{"role": "user", "template": "w1 {mask:2}"}]}, '{"role": "assistant", "template": ...}'),
        ({"messages": [{"role": "assistant", "template": "w1 {mask:2}", "content": "w1"}]}, "without content"),
        ({"messages": [{"role": "assistant", "template": "w1 {mask:2}"}]}, "'messages' must be a non-empty list"),
        (
            {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "template": "w1"}]},
            "'messages[-1].template' has no hole",
        ),
    ],
)  # fmt: skip
def test_faults_are_one_line(record: dict[str, Any], words: str) -> None:
    assert words in fault(record, max_length=64)


def test_requests_of_python_are_checked_too() -> None:
    parser = Parser(CONFIG, None, SamplingConfig())
    good = Request("a", (10, 20, 30), holes=((1, 2), (3, 1)))
    assert parser.checked(good).canvas(MASK) == (10, MASK, MASK, MASK, 20, 30) and good.sampling.gen_length == 3
    for holes in (((1, 0),), ((2, 1), (1, 1)), ((1, 2), (2, 1)), ((-1, 2),), ((5, 1),)):
        with pytest.raises(Exception, match="holes must be in order, apart from each other"):
            parser.checked(dataclasses.replace(good, holes=holes))
    with pytest.raises(TypeError, match="holes"):
        Request("a", (10, 20), holes=(3,))  # type: ignore[arg-type]
    with pytest.raises(Exception, match="prefix_len"):
        parser.checked(dataclasses.replace(good, prefix_len=2))
    with pytest.raises(Exception, match="requests with holes"):
        parser.checked(Request("a", (10, 20), trim=True))
    sampling = parse({"template": "w1 {mask:9}"}, cache=CacheConfig(block_cache="dual"), block_length=4).sampling
    assert (sampling.gen_length, sampling.block_length) == (9, 4)  # whose last block is shorter


@pytest.mark.full
def test_block_causal_models_fill_one_hole_at_the_end() -> None:
    model = families.load("sdar")
    engine, mask_id = Engine(model), model.config.mask_id
    (filled,) = engine.generate({"template_ids": [*range(10, 20), *[mask_id] * 9]})
    (answer,) = engine.generate({"id": "1", "prompt_ids": list(range(10, 20)), "gen_length": 9})
    assert filled.token_ids == answer.token_ids == filled.holes[0].token_ids


def test_block_causal_models_refuse_text_behind_a_hole() -> None:
    for ids in ([10, MASK, 11], [10, MASK, 11, MASK]):
        assert "block-causal, so a hole does not see the text behind it" in fault(
            {"template_ids": ids}, attention="block_causal"
        )


def read(request: Request, *filled: int, spaced: bool = True) -> Any:
    """The text of a template whose holes are filled with these tokens."""
    config = dataclasses.replace(CONFIG, eos_ids=(3,))
    canvas, tokens = list(request.canvas(MASK)), iter(filled)
    canvas = [next(tokens) if token == MASK else token for token in canvas]
    return read_text(canvas[request.lead :], request, config, word_tokenizer(CONFIG.vocab_size, (3,)))


def test_the_text_is_the_template_filled() -> None:
    record = {"template": "w10  w20: {mask:2} w30,\n{mask:2}{mask:1} w40 "}
    read_whole = read(parse(record), 5, 6, 7, 3, 8)
    assert read_whole.text == "w10  w20: w5 w6 w30,\nw7 w3 w8 w40 " and read_whole.ended and read_whole.length == 5
    assert read_whole.holes == (Filled((5, 6), "w5 w6"), Filled((7, 3), "w7 w3"), Filled((8,), " w8"))
    trimmed = read(parse({**record, "trim": True}), 5, 6, 7, 3, 8)
    assert trimmed.text == "w10  w20: w5 w6 w30,\nw7 w8 w40 " and trimmed.length == 4
    assert [hole.text for hole in trimmed.holes] == ["w5 w6", "w7", " w8"]
    assert trimmed.holes[1].token_ids == (7, 3)
    stopped = read(parse({**record, "stop": "w6"}), 5, 6, 7, 9, 8)
    assert stopped.text == "w10  w20: w5  w30,\nw7 w9 w8 w40 " and stopped.ended
    ids = [10, MASK, 20, MASK, MASK]
    assert read(parse({"template_ids": ids, "trim": True}), 5, 6, 3).text == "w10 w5 w20 w6"
    partial = read(parse(record), 5, MASK, MASK, MASK, 8)
    assert partial.text == "w10  w20: w5\u2591 w30,\n\u2591\u2591 w8 w40 " and not partial.ended


@pytest.fixture(scope="module")
def model() -> Model:
    loaded = load_model(FOLDER)
    config = dataclasses.replace(loaded.config, eos_ids=(3,))
    return dataclasses.replace(loaded, config=config, tokenizer=word_tokenizer(config.vocab_size, (3,)))


SHARED = " ".join(f"w{i}" for i in range(20, 44))


def test_streams_samples_and_what_precedes_the_first_hole(model: Model) -> None:
    engine = Engine(model, cache=CacheConfig(boundary=2), sampling=SamplingConfig(8, temperature=0.8))
    requests: list[Any] = [
        {"id": "one", "template": f"{SHARED} w9 {{mask:5}} w8 {{mask:3}} w7"},
        {"id": "two", "template": [SHARED, " w11 w12 ", 2, " w7 ", 6]},
        {"id": "plain", "prompt": f"{SHARED} w13"},
        {"id": "several", "template": f"{SHARED} {{mask:8}} w9", "n": 3},
    ]
    results = engine.generate(requests)
    assert [result.prefix_len for result in results] == [24] * 6
    assert engine.stats.prefixes_encoded == 1
    assert len({result.token_ids for result in results[3:]}) == 3
    seen = list(engine.stream(requests, every=3))
    finished = {(result.id, result.sample): result for result in seen if result.finish_reason}
    assert [finished[result.id, result.sample] for result in results] == results
    frame = next(result for result in seen if result.id == "one")
    assert frame.finish_reason is None and len(frame.token_ids) == 10 and len(frame.masked) == 5
    assert all(frame.token_ids[place] == MASK for place in frame.masked) and {5, 9}.isdisjoint(frame.masked)
    assert frame.text is not None and frame.text.startswith(f"{SHARED} w9 ") and frame.text.count("\u2591") == 5
    record = results[0].to_json()
    assert [hole["token_ids"] for hole in record["holes"]] == [list(hole.token_ids) for hole in results[0].holes]
    assert json.loads(json.dumps(record)) == record and "holes" not in results[2].to_json()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_fills_templates_resumes_and_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = list(range(20, 40))
    asked = [{"id": f"t{i}", "template_ids": [*ids, *[MASK] * 3, 50 + i, *[MASK] * 5]} for i in range(4)]
    source.write_text("".join(json.dumps(line) + "\n" for line in [*asked, {"template_ids": ids}]))
    flags = ["generate", "--model", str(FOLDER), "--boundary", "2", "--quiet", "--no-compilation-cache"]
    flags += ["--input", str(source), "--output", str(output)]
    assert main([*flags, "--dry-run"]) == 3
    plan = capsys.readouterr()
    assert "4 rows over 1 prefix" in plan.out and "line 5: 'template_ids' has no hole" in plan.err

    def interrupted(self: FileOutput) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FileOutput, "finish", interrupted)
        assert main(flags) == 130
    journal = journal_path(output)
    header, *kept = journal.read_text().splitlines(keepends=True)
    assert main([*flags, "--resume"]) == 3
    whole = lines(output)
    assert [len(result["holes"]) for result in whole[:4]] == [2] * 4 and whole[4]["finish_reason"] == "error"
    assert [result["prefix_len"] for result in whole[:4]] == [20] * 4
    output.unlink()
    journal.write_text(header + "".join(line for line in kept if json.loads(line)["id"] in ("t1", "t3")))
    assert main([*flags, "--resume"]) == 3 and lines(output) == whole
