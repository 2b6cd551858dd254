"""A masked denoiser of your own in the engine: wrap it, check it, run it.

    python examples/own_architecture.py

The first part is a model as someone writes it who has never seen this library: Flax NNX modules with learned positions,
LayerNorm and a GELU MLP, under names of their own, and a plain loop that fills in one token at a time. The second part
is all that the engine needs to run it. The third part checks and runs both: with policy `none` the engine gives the
tokens of the plain loop, and with `bicache` it keeps the prefix that prompts share. Weights are random.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from safetensors.numpy import save_file

from bicache_jax import CacheConfig, Engine, Family, Model, ModelConfig, SamplingConfig, load_model, register_family
from bicache_jax.checkpoints.fields import TensorMap
from bicache_jax.core.attention import Attention, prefix_attention
from bicache_jax.testing import check_backbone

# 1. The model as it was before.

WIDTH, HEADS, LAYERS, VOCAB, LONGEST, MASK = 48, 4, 5, 97, 96, 96


class Mixer(nnx.Module):
    """Bidirectional attention."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises the projections."""
        self.to_q, self.to_k, self.to_v, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))

    def __call__(self, h: Array) -> Array:
        """Mixes [B, S, WIDTH]."""
        q, k, v = (
            to(h).reshape(*h.shape[:2], HEADS, WIDTH // HEADS).swapaxes(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (WIDTH // HEADS) ** -0.5, axis=-1)
        return self.out((weights @ v).swapaxes(1, 2).reshape(h.shape))


class Layer(nnx.Module):
    """Attention and a GELU MLP, each behind a LayerNorm."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises the layer."""
        self.before_mixer, self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mixer = Mixer(rngs=rngs)
        self.widen, self.narrow = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        """Runs [B, S, WIDTH]."""
        h = h + self.mixer(self.before_mixer(h))
        return h + self.mlp(h)

    def mlp(self, h: Array) -> Array:
        """The MLP's part."""
        return self.narrow(jax.nn.gelu(self.widen(self.before_mlp(h))))


class Denoiser(nnx.Module):
    """Predicts the masked tokens of [B, S] ids."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises the model."""
        self.words, self.places = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LONGEST, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs=rngs) for _ in range(LAYERS)])
        self.last, self.logits = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        """Logits [B, S, VOCAB]."""
        h = self.words(ids) + self.places(jnp.arange(ids.shape[1]))
        for layer in self.layers:
            h = layer(h)
        return self.logits(self.last(h))


def plain_loop(model: Callable[[Array], Array], prompt: Sequence[int], length: int) -> list[int]:
    """Fills in the masked position that the model is surest of, until none is left."""
    ids = jnp.asarray([*prompt, *[MASK] * length])
    for _ in range(length):
        logits = model(ids[None])[0]
        best = jnp.argmax(logits.at[:, MASK].set(-jnp.inf), axis=-1)
        sure = jnp.take_along_axis(jax.nn.softmax(logits), best[:, None], axis=-1)[:, 0]
        undecided = (ids == MASK) & (jnp.arange(len(ids)) >= len(prompt))
        at = jnp.argmax(jnp.where(undecided, sure, -jnp.inf))
        ids = ids.at[at].set(best[at])
    return [int(token) for token in ids[len(prompt) :]]


# 2. What the engine needs: the pieces of a layer, parameters as stacked arrays, and the numbers.

CONFIG = ModelConfig(
    family="own",
    vocab_size=VOCAB,
    d_model=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=WIDTH // HEADS,
    d_mlp=8 * WIDTH // 3,  # costs are counted for three matrices of this width; there are two of 4 * WIDTH
    rope_theta=1.0,  # this and the next are not read by the pieces below
    norm_eps=1e-6,
    max_length=LONGEST,
    mask_id=MASK,
)


@functools.cache
def graphs() -> tuple[nnx.GraphDef[Layer], nnx.GraphDef[nnx.LayerNorm]]:
    """The modules without their parameters."""
    layer = nnx.eval_shape(lambda: Layer(rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0], nnx.split(nnx.eval_shape(lambda: nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))))[0]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The denoiser as `bicache_jax.core.backbone.Backbone`: its own modules, called in parts."""

    config: ModelConfig
    attention: Attention
    axis: str | None = None
    axes: None = None  # parameters are never split over devices

    def embed(self, params: Any, ids: Array, positions: Array) -> Array:
        """Words and places; padding may stand behind the last place."""
        return params["words"][ids] + params["places"][jnp.minimum(positions, LONGEST - 1)]

    def query(self, layer: Any, x_btd: Array, positions_bt: Array) -> Array:
        """Queries [B, N, T, H]."""
        own = self._layer(layer)
        return self._heads(own.mixer.to_q(own.before_mixer(x_btd)))

    def key_value(self, layer: Any, x_btd: Array, positions_bt: Array) -> tuple[Array, Array]:
        """Keys and values [B, K, T, H]."""
        own = self._layer(layer)
        h = own.before_mixer(x_btd)
        return self._heads(own.mixer.to_k(h)), self._heads(own.mixer.to_v(h))

    def finish(self, layer: Any, x_btd: Array, attended_bnth: Array) -> Array:
        """What follows attention."""
        own = self._layer(layer)
        h = x_btd + own.mixer.out(attended_bnth.swapaxes(1, 2).reshape(x_btd.shape))
        return h + own.mlp(h)

    def final_norm(self, params: Any, x: Array) -> Array:
        """The last LayerNorm."""
        return nnx.merge(graphs()[1], nnx.State(params["last"]))(x)

    def head(self, params: Any) -> tuple[Array, Array | None, Array | None]:
        """Rows of the head [V, D] and their bias; there are no weights in 8 bits."""
        return params["logits"]["rows"], params["logits"]["bias"], None

    def _layer(self, layer: Any) -> Layer:
        return nnx.merge(graphs()[0], nnx.State(layer))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], HEADS, WIDTH // HEADS).swapaxes(1, 2)


def params_of(model: Denoiser) -> dict[str, Any]:
    """The parameters as nested dicts, those of the layers stacked."""
    own = [nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in model.layers]
    logits = nnx.to_pure_dict(nnx.state(model.logits, nnx.Param))
    return {
        "words": model.words.embedding[...],
        "places": model.places.embedding[...],
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *own),
        "last": nnx.to_pure_dict(nnx.state(model.last, nnx.Param)),
        "logits": {"rows": logits["kernel"].T, "bias": logits["bias"]},
    }


# With these the checkpoints of such models are read by `load_model`, too. They are not needed to run one.


def init(config: ModelConfig, key: Array, dtype: Any) -> dict[str, Any]:
    """Random parameters; a loader takes the shapes from here."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params_of(Denoiser(rngs=nnx.Rngs(key))))


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`."""
    return dataclasses.replace(CONFIG, num_layers=int(fields["depth"]), mask_id=int(fields["mask_token_id"]))


def tensor_map(config: ModelConfig) -> TensorMap:
    """Tensor names, by the parameters' paths: here `layers.3.mixer.to_q.kernel`, as NNX calls them."""
    flat = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: init(config, jax.random.key(0), "float32")))[0]
    paths = [tuple(entry.key for entry in path) for path, _ in flat]
    names = {path: ".".join(path).replace("layers.", "layers.{layer}.", 1) for path in paths}
    return TensorMap(names, transposed=())  # Flax stores `kernel` as [in, out]


OWN = Family("own", Pieces, init, ("own-denoiser",), config_from_hf, tensor_map)

# 3. Check it and run it.


def requests(count: int, prefix_len: int) -> list[dict[str, Any]]:
    """Prompts of random tokens that share a prefix."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, MASK, prefix_len).tolist()
    return [{"prompt_ids": shared + rng.integers(0, MASK, 5).tolist(), "prefix_len": prefix_len} for _ in range(count)]


def save(params: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint as someone might have done."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        first, *rest = (entry.key for entry in path)
        for at, part in enumerate(leaf) if first == "layers" else [("", leaf)]:
            tensors[".".join([first, *([str(at)] if first == "layers" else []), *rest])] = np.ascontiguousarray(part)
    save_file(tensors, folder / "model.safetensors")
    fields = {"model_type": "own-denoiser", "depth": LAYERS, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(fields))


CACHES = {
    "none": CacheConfig(policy="none"),
    "bicache": CacheConfig(policy="bicache", boundary=2, refresh_interval=4),
}


def main(count: int = 6, prefix_len: int = 40, length: int = 12, policies: Sequence[str] = tuple(CACHES)) -> None:
    """Runs the example."""
    denoiser = Denoiser(rngs=nnx.Rngs(0))
    params = params_of(denoiser)
    check_backbone(Pieces(CONFIG, prefix_attention), params)
    print("check_backbone: no faults")

    asked, sampling = requests(count, prefix_len), SamplingConfig(gen_length=length)
    model = Model(CONFIG, params, backbone=Pieces)
    wanted = [plain_loop(nnx.jit(denoiser), one["prompt_ids"], length) for one in asked]
    for policy in policies:
        engine = Engine(model, cache=CACHES[policy], sampling=sampling)
        found = [list(result.token_ids) for result in engine.generate(asked)]
        same = np.mean(np.asarray(found) == np.asarray(wanted))
        print(f"policy {policy}: {same:.0%} of the plain loop's {count * length} tokens")
        assert policy != "none" or found == wanted, "the engine and the plain loop differ"
    print("(with random weights the share of bicache says nothing: that is for a trained model to show)")

    register_family(OWN, replace=True)
    with tempfile.TemporaryDirectory() as folder:
        save(params, Path(folder))
        loaded = load_model(folder, dtype="float32")
    engine = Engine(loaded, cache=CACHES["none"], sampling=sampling)
    assert [list(result.token_ids) for result in engine.generate(asked)] == wanted
    print("load_model: a checkpoint of the registered family gives them, too")


if __name__ == "__main__":
    main()
