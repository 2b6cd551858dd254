"""`check_backbone` passes what is right and names what is wrong."""

from __future__ import annotations

from typing import Any

import families
import golden
import jax
import jax.numpy as jnp
import pytest
from own_backbone import CONFIG, Right, init, turned

from bicache_jax import load_model
from bicache_jax.checkpoints.tree import paths
from bicache_jax.testing import BackboneError, backbone_faults, check_backbone
from bicache_jax.wiring import backbone_for

PARAMS = init(CONFIG, jax.random.key(0))


def test_a_right_backbone_has_no_faults():
    check_backbone(Right(), PARAMS)


@pytest.mark.parametrize(
    "name",
    [
        "llada-mha",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("dream-gqa", *families.FOLDERS)),
    ],
)
def test_families_have_no_faults(name):
    model = families.load(name) if name in families.FOLDERS else load_model(golden.DATA / name)
    check_backbone(backbone_for(model.config), model.params)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", "none"), ("float32", "w8"), ("bfloat16", "w8a8")])
def test_other_formats_have_no_faults(dtype, quantize):
    model = load_model("example", dtype=dtype, quantize=quantize)
    check_backbone(backbone_for(model.config), model.params)


class Traced(Right):
    """Looks at a value."""

    def query(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().query(layer, x, positions if positions[0, 0] == 0 else positions + 1)


class Raises(Right):
    """Multiplies what does not fit."""

    def finish(self, layer: Any, x: Any, attended: Any) -> Any:
        return x @ layer["down"]


class HeadsLast(Right):
    """[B, T, K, H] in place of [B, K, T, H]."""

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        k, v = super().key_value(layer, x, positions)
        return k.swapaxes(1, 2), v


class OneResult(Right):
    """Keys alone."""

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(layer, x, positions)[0]


class Half(Right):
    """Another dtype than the parameters'."""

    def embed(self, params: Any, ids: Any, positions: Any) -> Any:
        return super().embed(params, ids, positions).astype(jnp.bfloat16)


class HeadTurned(Right):
    """[D, V] in place of [V, D]."""

    def head(self, params: Any) -> Any:
        return params["table"].T, None, None


class HeadAlone(Right):
    """The rows without what belongs to them."""

    def head(self, params: Any) -> Any:
        return params["table"]


class Infinite(Right):
    """Divides by zero."""

    def final_norm(self, params: Any, x: Any) -> Any:
        return x / jnp.zeros(())


class Learned(Right):
    """Positions of which padding has more than there are."""

    def embed(self, params: Any, ids: Any, positions: Any) -> Any:
        table = jnp.ones((self.config.max_length, self.config.d_model))
        return params["table"][ids] + jnp.take(table, positions, axis=0)


class Pooled(Right):
    """Adds the mean over the tokens."""

    def finish(self, layer: Any, x: Any, attended: Any) -> Any:
        return super().finish(layer, x, attended) + jnp.mean(x, axis=1, keepdims=True)


class Counted(Right):
    """Counts places."""

    def query(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().query(layer, x, jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape))

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(layer, x, jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape))


class BatchNorm(Right):
    """Normalises over the rows."""

    def final_norm(self, params: Any, x: Any) -> Any:
        return x - jnp.mean(x, axis=0)


class BatchSize(Right):
    """Knows how many rows there are."""

    def final_norm(self, params: Any, x: Any) -> Any:
        return x * x.shape[0]


class NoPositions(Right):
    """A bag of words."""

    def query(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().query(layer, x, positions * 0)

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(layer, x, positions * 0)


class RawKeys(Right):
    """Caches keys as they are before they are rotated."""

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(layer, x, positions * 0)


class Backwards(Right):
    """Rotates keys against queries."""

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(layer, x, -positions)


class TurnedValues(Right):
    """Rotates values, too."""

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        k, v = super().key_value(layer, x, positions)
        return k, turned(v.swapaxes(1, 2), positions).swapaxes(1, 2)


class OneLayer(Right):
    """Does not read what it is given of the layer."""

    def query(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().query(_first(), x, positions)

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        return super().key_value(_first(), x, positions)

    def finish(self, layer: Any, x: Any, attended: Any) -> Any:
        return super().finish(_first(), x, attended)


def _first() -> Any:
    return jax.tree.map(lambda leaf: leaf[0], PARAMS["layers"])


class Mutable(Right):
    """Has no hash."""

    __hash__ = None


class Identity(Right):
    """Equal to itself only."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Tabled(Right):
    """Says how one parameter is split, and nothing of the others."""

    @property
    def axes(self) -> Any:
        return {("table",): ("vocab", "width")}


class Misnamed(Right):
    """Splits along what does not exist."""

    @property
    def axes(self) -> Any:
        return {(*path,): ("wide",) * leaf.ndim for path, leaf in paths(PARAMS)}


class Incomplete:
    """Has neither finish nor axes."""

    config, attention, axis = CONFIG, Right.attention, None
    embed, query, key_value = Right.embed, Right.query, Right.key_value
    final_norm, head = Right.final_norm, Right.head


LISTED = PARAMS | {"layers": [jax.tree.map(lambda leaf, at=at: leaf[at], PARAMS["layers"]) for at in range(2)]}
UNSTACKED = PARAMS | {"layers": PARAMS["layers"] | {"up": PARAMS["layers"]["up"][0]}}


@pytest.mark.parametrize(
    ("backbone", "params", "name", "word"),
    [
        (Incomplete(), PARAMS, "interface", "Incomplete lacks finish, axes"),
        (Right(config={"d_model": 12}), PARAMS, "config", "ModelConfig, got dict"),
        (Right(axis="model"), PARAMS, "config", "axis is 'model'"),
        (Mutable(), PARAMS, "value", "has no hash"),
        (Identity(), PARAMS, "value", "compile again"),
        (Right(), LISTED, "params", "['layers'][0]['down']: parameters must be in dicts"),
        (Right(), PARAMS | {"rate": 0.1}, "params", "['rate'] must be an array, got float"),
        (Right(), {"table": PARAMS["table"]}, "stacking", "params['layers'] is missing"),
        (Right(), UNSTACKED, "stacking", "layers/up has shape [12, 16]"),
        (Tabled(), PARAMS, "axes", "layers/down is not in the partition table"),
        (Misnamed(), PARAMS, "axes", "has an axis 'wide', known: heads"),
        (Traced(), PARAMS, "traced", "query needs the value of a traced array"),
        (Raises(), PARAMS, "raises", "finish raises TypeError"),
        (HeadsLast(), PARAMS, "shape", "key_value's keys must be [2, 2, 7, 4], got [2, 7, 2, 4]"),
        (OneResult(), PARAMS, "shape", "key_value must return keys and values, got 1"),
        (Half(), PARAMS, "dtype", "embed's result is bfloat16, but activations are float32"),
        (HeadTurned(), PARAMS, "shape", "head's rows must be [23, 12]"),
        (HeadAlone(), PARAMS, "shape", "head must return its rows, its bias or None"),
        (Infinite(), PARAMS, "finite", "final_norm gives"),
        (Learned(), PARAMS, "padding", "embed is not finite at positions from max_length on"),
        (Pooled(), PARAMS, "neighbours", "finish of a token changes"),
        (Counted(), PARAMS, "places", "query follows a token's place"),
        (BatchNorm(), PARAMS, "rows", "final_norm of a row changes with the rows beside it"),
        (BatchSize(), PARAMS, "rows", "final_norm of a row is another one in a batch than alone"),
        (NoPositions(), PARAMS, "positions", "nothing depends on the position"),
        (RawKeys(), PARAMS, "rotation", "query moves with the position and keys does not"),
        (Backwards(), PARAMS, "rotation", "turn differently"),
        (TurnedValues(), PARAMS, "rotation", "values turn"),
        (OneLayer(), PARAMS, "layers", "compute the same"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Right | Incomplete) else "",
)
def test_each_fault_is_named_in_one_line(backbone, params, name, word):
    faults = backbone_faults(backbone, params)
    assert [fault for fault in faults if fault.name == name and word in fault.line], list(map(str, faults))
    assert not any("\n" in str(fault) for fault in faults)


def test_all_faults_are_reported_together():
    class Two(HeadTurned, HeadsLast):
        pass

    with pytest.raises(BackboneError) as raised:
        check_backbone(Two(), PARAMS)
    assert [fault.name for fault in raised.value.faults] == ["shape", "shape"]
    assert len(str(raised.value).splitlines()) == 2
