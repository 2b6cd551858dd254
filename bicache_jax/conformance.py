"""What is wrong with a backbone: checks of every promise of `bicache_jax.core.backbone`, one line for each fault.

First its interface and the shapes of parameters and results, by abstract evaluation, where nothing is computed. Then,
where these are right, what the pieces do to a few random tokens: the same ones in another order, with other neighbours,
in other rows, at other positions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bicache_jax.core.backbone import Backbone, Params, lacking, layer_params
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.numerics import activation_dtype
from bicache_jax.core.types import BicacheError
from bicache_jax.sharding import param_specs

ROWS, TOKENS = 2, 7
"""Sizes of what is tried."""
SHIFT = 3
"""By how much positions are moved."""
_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.UnexpectedTracerError,
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that a backbone does not keep to.

    Attributes:
        name: which promise: `interface`, `value`, `config`, `params`, `stacking`, `axes`, `traced`, `raises`, `shape`,
            `dtype`, `finite`, `padding`, `neighbours`, `places`, `rows`, `layers`, `positions` or `rotation`.
        line: what it does instead.
    """

    name: str
    line: str

    def __str__(self) -> str:
        return f"{self.name}: {self.line}"


class BackboneError(BicacheError):
    """A backbone has faults; the message has a line for each.

    Attributes:
        faults: what they are.
    """

    def __init__(self, faults: list[Fault]) -> None:
        """Makes the message."""
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))


def check_backbone(backbone: Any, params: Params, *, tolerance: float | None = None, seed: int = 0) -> None:
    """Checks that the decoding code can run on a backbone and keep its promises.

    Args:
        backbone: the backbone of the whole model (`axis=None`).
        params: its parameters, random or trained. All-zero ones hide faults.
        tolerance: largest difference, relative to the largest magnitude of a result, between numbers that should be
            equal; None: 2e-5 in float32, 3e-2 in 16 bits.
        seed: of the tokens.

    Raises:
        BackboneError: it has faults.
    """
    if faults := backbone_faults(backbone, params, tolerance=tolerance, seed=seed):
        raise BackboneError(faults)


def backbone_faults(backbone: Any, params: Params, *, tolerance: float | None = None, seed: int = 0) -> list[Fault]:
    """The faults that `check_backbone` reports; none if all is well. Arguments as there."""
    for stage in (_interface, _parameters, _shapes):
        if found := [Fault(name, line) for name, line in stage(backbone, params)]:
            return found
    trial = _Trial(backbone, params, tolerance, seed)
    return [Fault(name, line) for name, line in trial.faults()]


Found = Iterator[tuple[str, str]]


def _interface(backbone: Any, params: Params) -> Found:
    if missing := lacking(backbone):
        yield "interface", missing
        return
    kind = type(backbone).__name__
    if not isinstance(backbone.config, ModelConfig):
        yield "config", f"config must be a ModelConfig, got {type(backbone.config).__name__}"
    if backbone.axis is not None:
        yield "config", f"axis is {backbone.axis!r}: check the backbone of the whole model, whose axis is None"
    try:
        hash(backbone)
    except TypeError as error:
        yield "value", f"{kind} has no hash, which a static argument of jax.jit needs ({error}): make it frozen"
        return
    if copy.copy(backbone) != backbone:
        yield "value", f"two equal {kind} do not compare equal, so every call would compile again: give it __eq__"


def _parameters(backbone: Backbone, params: Any) -> Found:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in flat:
        if not all(isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, str) for entry in path):
            yield "params", f"{jax.tree_util.keystr(path)}: parameters must be in dicts with words as keys"
            return
        if not isinstance(leaf, jax.Array | np.ndarray):
            yield "params", f"{jax.tree_util.keystr(path)} must be an array, got {type(leaf).__name__}"
            return
    if not isinstance(params, Mapping) or not params.get("layers"):
        yield "stacking", "params['layers'] is missing: the parameters of all layers, stacked along their first axis"
        return
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in flat):
        yield "params", "no parameter is of a floating-point dtype"
        return
    count = backbone.config.num_layers
    for path, leaf in flat:
        if path[0].key == "layers" and leaf.shape[:1] != (count,):
            name = "/".join(entry.key for entry in path)
            yield "stacking", f"{name} has shape {list(leaf.shape)}: its first axis must be that of the {count} layers"
    try:
        param_specs(backbone.axes, params)
    except ValueError as error:
        yield "axes", str(error)


def _shapes(backbone: Backbone, params: Any) -> Found:
    config, dtype = backbone.config, activation_dtype(params)
    ids = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, config.d_model), dtype)
    q = (ROWS, config.num_heads, TOKENS, config.head_dim)
    kv = (ROWS, config.num_kv_heads, TOKENS, config.head_dim)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    pieces: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, tuple[int, ...]]]] = {
        "embed": (backbone.embed, (params, ids, ids), {"result": x.shape}),
        "query": (_of_layer(backbone.query), (params, index, x, ids), {"result": q}),
        "key_value": (_of_layer(backbone.key_value), (params, index, x, ids), {"keys": kv, "values": kv}),
        "finish": (
            _of_layer(backbone.finish),
            (params, index, x, jax.ShapeDtypeStruct(q, dtype)),
            {"result": x.shape},
        ),
        "final_norm": (backbone.final_norm, (params, x), {"result": x.shape}),
    }
    for name, (call, arguments, wanted) in pieces.items():
        found = yield from _evaluated(name, call, arguments)
        results = found if isinstance(found, tuple) else (found,)
        if found is None:
            continue
        if len(results) != len(wanted):
            yield "shape", f"{name} must return {' and '.join(wanted)}, got {len(results)} results"
            continue
        for (part, shape), result in zip(wanted.items(), results, strict=True):
            yield from _compared(f"{name}'s {part}", result, shape, dtype)
    head = yield from _evaluated("head", backbone.head, (params,))
    if head is None:
        return
    if not isinstance(head, tuple) or len(head) != 3:
        yield "shape", "head must return its rows, its bias or None, and its scales or None"
        return
    rows, bias, scale = head
    if rows.shape != (config.vocab_size, config.d_model):
        wanted_rows = f"[{config.vocab_size}, {config.d_model}] (vocab_size, d_model)"
        yield "shape", f"head's rows must be {wanted_rows}, got {list(rows.shape)}"
    for part, array in (("bias", bias), ("scales", scale)):
        if array is not None and array.shape != (config.vocab_size,):
            yield "shape", f"head's {part} must be [{config.vocab_size}], got {list(array.shape)}"
    if (scale is None) == (rows.dtype == jnp.int8):
        yield "dtype", f"head's rows are {rows.dtype.name}, and {'no' if scale is None else 'its'} scales are given"


def _of_layer(piece: Callable[..., Any]) -> Callable[..., Any]:
    """A piece as a function of all parameters and the number of the layer."""
    return lambda params, index, *arguments: piece(layer_params(params, index), *arguments)


def _evaluated(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Shapes of what a piece returns, everything it is given being traced; None after a fault."""
    try:
        return jax.eval_shape(call, *arguments)
    except _TRACED as error:
        yield "traced", f"{name} needs the value of a traced array, so it cannot be compiled ({_first_line(error)})"
    except Exception as error:  # whatever the piece raises
        yield "raises", f"{name} raises {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _compared(what: str, found: Any, shape: tuple[int, ...], dtype: Any) -> Found:
    if not hasattr(found, "shape"):
        yield "shape", f"{what} must be an array, got {type(found).__name__}"
    elif found.shape != shape:
        yield "shape", f"{what} must be {list(shape)}, got {list(found.shape)}"
    elif found.dtype != dtype:
        yield "dtype", f"{what} is {found.dtype.name}, but activations are {dtype.name}, as the parameters"


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """What the pieces are tried on."""

    ids: np.ndarray
    positions: np.ndarray
    x: np.ndarray
    attended: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> _Tokens:
        """All arrays [B, T, ...] changed in one way."""
        return self.joined(self, lambda own, _: change(own))

    def joined(self, other: _Tokens, join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Tokens:
        """All arrays joined with another's in one way."""
        names = [field.name for field in dataclasses.fields(self)]
        return _Tokens(*(join(getattr(self, name), getattr(other, name)) for name in names))


class _Trial:
    """Runs a backbone's pieces, all in one program, on tokens that differ in one respect."""

    def __init__(self, backbone: Backbone, params: Params, tolerance: float | None, seed: int) -> None:
        self.config, self.params = backbone.config, params
        self.dtype = activation_dtype(params)
        self.tolerance = (2e-5 if self.dtype.itemsize >= 4 else 3e-2) if tolerance is None else tolerance
        self.rng = np.random.default_rng(seed)

        @jax.jit
        def run(params: Params, index: Array, ids: Array, positions: Array, x: Array, attended: Array) -> Any:
            layer = layer_params(params, index)
            keys, values = backbone.key_value(layer, x, positions)
            return {
                "embed": backbone.embed(params, ids, positions),
                "query": backbone.query(layer, x, positions).swapaxes(1, 2),
                "keys": keys.swapaxes(1, 2),
                "values": values.swapaxes(1, 2),
                "finish": backbone.finish(layer, x, attended.swapaxes(1, 2)),
                "final_norm": backbone.final_norm(params, x),
            }

        self._run = run

    def draw(self, rows: int = ROWS) -> _Tokens:
        """Random tokens, positions in no order."""
        config, most = self.config, min(self.config.max_length, 4 * TOKENS)
        return _Tokens(
            self.rng.integers(0, config.vocab_size, (rows, TOKENS)),
            np.stack([self.rng.permutation(max(most - SHIFT, TOKENS))[:TOKENS] for _ in range(rows)]),
            self.rng.normal(size=(rows, TOKENS, config.d_model)),
            self.rng.normal(size=(rows, TOKENS, config.num_heads, config.head_dim)),
        )

    def run(self, tokens: _Tokens, layer: int = 0) -> dict[str, np.ndarray]:
        """What the pieces make of tokens, [B, T, ...] in float64."""
        ids, positions = (jnp.asarray(part, jnp.int32) for part in (tokens.ids, tokens.positions))
        floats = (jnp.asarray(part, self.dtype) for part in (tokens.x, tokens.attended))
        found = self._run(self.params, jnp.asarray(layer, jnp.int32), ids, positions, *floats)
        return {name: np.asarray(result, np.float64) for name, result in found.items()}

    def differing(self, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> list[str]:
        """Pieces whose results differ."""
        return [
            name
            for name, left in one.items()
            if np.max(np.abs(left - other[name]), initial=0) > self.tolerance * max(1.0, np.max(np.abs(left)))
        ]

    def faults(self) -> Found:
        """All faults, each once, though every layer may have it."""
        seen: set[tuple[str, str]] = set()
        for layer in sorted({0, self.config.num_layers - 1}):
            for fault in self._of_one_layer(layer):
                if fault not in seen:
                    seen.add(fault)
                    yield fault
        if not any(name == "finite" for name, _ in seen):
            yield from self._layers_differ()

    def _of_one_layer(self, layer: int) -> Found:
        tokens = self.draw()
        base = self.run(tokens, layer)
        if odd := [name for name, result in base.items() if not np.isfinite(result).all()]:
            for name in odd:
                yield "finite", f"{name} gives values that are not finite"
            return
        far = dataclasses.replace(tokens, positions=tokens.positions + self.config.max_length)
        for name, result in self.run(far, layer).items():
            if not np.isfinite(result).all():
                yield (
                    "padding",
                    f"{name} is not finite at positions from max_length on, where padding may be: clip them",
                )
        others, first = self.draw(), np.arange(TOKENS) == 0

        def beside(own: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.where(first.reshape(1, TOKENS, *[1] * (own.ndim - 2)), own, other)

        mixed = tokens.joined(others, beside)
        looks = self.differing(_at(base, np.s_[:, :1]), _at(self.run(mixed, layer), np.s_[:, :1]))
        for name in looks:
            yield "neighbours", f"{name} of a token changes with the tokens beside it, so padding and caches would show"
        order = self.rng.permutation(TOKENS)
        moved = self.run(tokens.map(lambda part: part[:, order]), layer)
        for name in self.differing(_at(base, np.s_[:, order]), moved):
            if name not in looks:
                yield "places", f"{name} follows a token's place in the array instead of its position"
        rest = tokens.joined(others, lambda own, other: np.concatenate([own[:1], other[1:]]))
        top = _at(base, np.s_[:1])
        for name in self.differing(top, _at(self.run(rest, layer), np.s_[:1])):
            yield "rows", f"{name} of a row changes with the rows beside it"
        for name in self.differing(top, self.run(tokens.map(lambda part: part[:1]), layer)):
            yield (
                "rows",
                f"{name} of a row is another one in a batch than alone (products of float32 need Precision.HIGHEST)",
            )
        yield from self._positions(tokens, base, layer)

    def _positions(self, tokens: _Tokens, base: Mapping[str, np.ndarray], layer: int) -> Found:
        """What moves with positions: something has to, and what looks like a rotation has to be one."""
        later = self.run(dataclasses.replace(tokens, positions=tokens.positions + SHIFT), layer)
        moved = self.differing(base, later)
        if not moved:
            yield "positions", "nothing depends on the position: neither embed nor query nor keys"
        turned = [name for name in ("query", "keys", "values") if name in moved and _same_sizes(base, later, name)]
        if "values" in turned:
            yield "rotation", "values turn with the position: queries and keys alone are rotated"
        if ("query" in moved) != ("keys" in moved):
            one, other = ("query", "keys") if "query" in moved else ("keys", "query")
            yield "rotation", f"{one} moves with the position and {other} does not"
        elif "query" in turned and "keys" in turned:
            group = self.config.num_heads // self.config.num_kv_heads
            scores = [
                np.einsum("btnh,bsnh->bnts", found["query"], np.repeat(found["keys"], group, axis=2))
                for found in (base, later)
            ]
            if self.differing({"scores": scores[0]}, {"scores": scores[1]}):
                yield "rotation", "queries and keys turn differently: scores change when all positions move alike"

    def _layers_differ(self) -> Found:
        if self.config.num_layers == 1:
            return
        own = [jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), self.params["layers"]) for at in (0, 1)]
        if all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, own), strict=True)):
            return
        tokens = self.draw()
        if not self.differing(self.run(tokens, 0), self.run(tokens, 1)):
            yield "layers", "layers 0 and 1 compute the same, though their parameters differ"


def _at(found: Mapping[str, np.ndarray], index: Any) -> dict[str, np.ndarray]:
    return {name: result[index] for name, result in found.items()}


def _same_sizes(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str) -> bool:
    """Whether heads have kept their norms, as under a rotation."""
    before, after = (np.linalg.norm(found[name], axis=-1) for found in (one, other))
    return bool(np.allclose(before, after, rtol=1e-2, atol=1e-2))
