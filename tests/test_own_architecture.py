"""Model families that are not in the library: given directly, registered, loaded."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_backbone import CONFIG, Right, init
from safetensors.numpy import save_file

import bicache_jax
from bicache_jax import BicacheError, CacheConfig, Engine, Family, Model, SamplingConfig, load_model, register_family
from bicache_jax.checkpoints.fields import TensorMap
from bicache_jax.models import family as registry
from bicache_jax.sharding import make_mesh

NAMES = ("q", "k", "v", "o", "up", "down")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    """The registry, as it was before when a test is over."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    return registry._REGISTERED


def config_from_hf(fields: Any, names: frozenset[str], source: str) -> Any:
    return dataclasses.replace(CONFIG, mask_id=fields["mask_token_id"])


def tensor_map(config: Any) -> TensorMap:
    layers = {("layers", name): f"part.{{layer}}.{name}" for name in NAMES}
    return TensorMap({("table",): "words", ("scale",): "gain", **layers})


OWN = Family("own", Right, init, ("own-model",), config_from_hf, tensor_map, mask_id=5)


@pytest.mark.parametrize("policies", [("none",), pytest.param(("none", "bicache"), marks=pytest.mark.full)])
def test_the_example_gives_the_tokens_of_the_plain_loop(families, capsys, policies):
    example = importlib.import_module("examples.own_architecture")
    example.main(count=2, prefix_len=20, length=4, policies=policies)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["check_backbone: no faults", "policy none: 100% of the plain loop's 8 tokens"]


def test_a_family_is_registered_loaded_and_used_by_the_functional_layer(families, tmp_path):
    params = init(CONFIG, jax.random.key(1))
    tensors = {"words": params["table"], "gain": params["scale"]}
    tensors |= {f"part.{i}.{name}": params["layers"][name][i] for name in NAMES for i in range(CONFIG.num_layers)}
    save_file({name: np.asarray(leaf) for name, leaf in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Own-Model"}))
    with pytest.raises(BicacheError, match="model_type is 'Own-Model', supported: "):
        load_model(tmp_path)
    register_family(OWN)
    model = load_model(tmp_path, dtype="float32")
    assert model.config == CONFIG and jax.tree.all(jax.tree.map(jnp.array_equal, model.params, params))
    ids = jnp.arange(6)[None]
    logits = bicache_jax.forward(model.params, model.config, ids)
    assert logits.shape == (1, 6, CONFIG.vocab_size)
    direct = dataclasses.replace(CONFIG, family="another")
    assert jnp.array_equal(logits, bicache_jax.forward(params, direct, ids, backbone=Right))
    with pytest.raises(BicacheError, match="no family is called 'another'.*register_family"):
        bicache_jax.forward(params, direct, ids)
    with pytest.raises(BicacheError, match="quantize: models of family 'own' have no form in 8 bits"):
        load_model(tmp_path, quantize="w8")
    with pytest.raises(BicacheError, match="full attention: leave block-causal out"):
        load_model(tmp_path, block_causal=True)
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own-model"}))
    save_file({"words": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(BicacheError, match="config.json has 2 layers, for 1 tensors"):
        load_model(folder)


@pytest.mark.full
def test_block_causal_attention_is_data_for_a_backbone_of_ones_own(families):
    config = dataclasses.replace(CONFIG, attention="block_causal", block_length=4)
    model = Model(config, init(config, jax.random.key(2)), backbone=Right)
    asked = [{"prompt_ids": [7, 8, 9, 10, 11, 12, 13, 14, last], "prefix_len": 8} for last in (15, 16)]
    sampling = SamplingConfig(gen_length=8)
    engines = [Engine(model, cache=CacheConfig(policy=policy), sampling=sampling) for policy in ("none", "exact")]
    found = [[result.token_ids for result in engine.generate(asked)] for engine in engines]
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: register_family(dataclasses.replace(OWN, name="llada")), "family 'llada' is registered already"),
        (
            lambda: register_family(dataclasses.replace(OWN, model_types=("dream",))),
            "model_type 'dream' is of family 'dream' already: give it is_mine",
        ),
        (lambda: Family("own", Right, init, ("own",), config_from_hf), "tensor_map is missing"),
        (lambda: Family("own", Right, init, ("Own",), config_from_hf, tensor_map), "lower-case words"),
        (lambda: Family("", Right, init), "name must not be empty"),
        (lambda: Family("own", int, init), "int lacks embed, query, key_value, finish, final_norm, head"),
    ],
)
def test_what_cannot_be_registered_is_said_in_one_line(families, made, said):
    with pytest.raises(BicacheError, match=said) as raised:
        made()
    assert "\n" not in str(raised.value)


def test_registering_twice_needs_replace(families):
    register_family(OWN)
    with pytest.raises(BicacheError, match="replace=True"):
        register_family(OWN)
    other = register_family(dataclasses.replace(OWN, mask_id=6), replace=True)
    assert families["own"] is other


def test_one_who_looks_closer_may_share_a_type(families):
    mine = dataclasses.replace(OWN, model_types=("dream",), is_mine=lambda fields: "own" in fields)
    register_family(mine)
    assert registry.family_of({"model_type": "dream", "own": True}) is mine
    assert registry.family_of({"model_type": "dream"}).name == "dream"


def test_a_backbone_that_lacks_a_piece_is_refused_by_engines(families):
    class Bare:
        def __init__(self, config, attention, axis=None):
            self.config, self.attention, self.axis, self.axes = config, attention, axis, None

    model = Model(CONFIG, init(CONFIG, jax.random.key(0)), backbone=Bare)
    with pytest.raises(BicacheError, match="Bare lacks embed, query, key_value, finish, final_norm, head"):
        Engine(model, cache=CacheConfig(policy="none"))


def test_parameters_without_axes_stay_whole():
    model = Model(CONFIG, init(CONFIG, jax.random.key(0)), backbone=Right)
    assert Engine(model, cache=CacheConfig(policy="none"), mesh=make_mesh("data=1,model=1")) is not None
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1] * 2).reshape(1, 2), ("data", "model"))
    with pytest.raises(BicacheError, match="use a mesh with model=1"):
        Engine(model, cache=CacheConfig(policy="none"), mesh=mesh)
