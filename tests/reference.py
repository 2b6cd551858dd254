"""A denoiser that is slow and obviously right: float64 NumPy, one row at a time, whole sequences in reading order.

It knows one trick. A pass always runs every position through every layer, and where a policy reuses keys and values,
those of the positions concerned are overwritten by the ones that were kept (`Kept`). Without a cache nothing is ever
overwritten. There are no buckets, no padding, no shared rows, no tiles, no running statistics and no split layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.core.layout import noise_words
from bicache_jax.decoding import head

OWN_RULE = {"llada": "low_confidence", "dream": "entropy"}


@dataclasses.dataclass
class Kept:
    """Keys and values that replace fresh ones: where `where[l, s]`, those of layer l at position s."""

    where: np.ndarray
    k: np.ndarray
    v: np.ndarray


@dataclasses.dataclass
class Reference:
    """A model in float64."""

    config: ModelConfig
    params: Any

    @classmethod
    def of(cls, config: ModelConfig, params: Any) -> Reference:
        return cls(config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))

    def _norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps) * scale

    def _rotate(self, x_snh: np.ndarray) -> np.ndarray:
        half = self.config.head_dim // 2
        angle = np.arange(len(x_snh))[:, None, None] * self.config.rope_theta ** (-np.arange(half) / half)
        first, second = x_snh[..., :half], x_snh[..., half:]
        turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        return np.concatenate(turned, axis=-1)

    def run(
        self, tokens: np.ndarray, kept: Kept | None = None, entering: tuple[int, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One pass over a whole sequence.

        Args:
            tokens: the sequence [S].
            kept: keys and values that replace fresh ones.
            entering: a layer, and hidden states [P, D] that replace those of the first positions in front of it.

        Returns:
            Logits [S, V]; keys and values as attention saw them [L, S, K, H]; hidden states in front of layers.
        """
        config, params = self.config, self.params
        x, size = params["embed"][tokens], len(tokens)
        keys, values, inputs = [], [], []
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
            if entering is not None and entering[0] == index:
                x = np.concatenate([entering[1], x[len(entering[1]) :]])
            inputs.append(x)

            def linear(name: str, x: np.ndarray, layer: Any = layer) -> np.ndarray:
                kernel = layer[name]["kernel"] if "kernel" in layer[name] else layer[name]["weight"].T
                return x @ kernel + layer[name].get("bias", 0)

            normed = self._norm(x, layer["attention_norm"]["scale"])
            q, k, v = (linear(name, normed).reshape(size, -1, config.head_dim) for name in ("q", "k", "v"))
            q, k = self._rotate(q), self._rotate(k)
            if kept is not None:
                where = kept.where[index][:, None, None]
                k, v = np.where(where, kept.k[index], k), np.where(where, kept.v[index], v)
            keys.append(k)
            values.append(v)
            group = config.num_heads // config.num_kv_heads
            scores = np.einsum("tnh,snh->nts", q, np.repeat(k, group, 1)) / np.sqrt(config.head_dim)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            attended = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), np.repeat(v, group, 1))
            x = x + linear("o", attended.reshape(size, -1))
            normed = self._norm(x, layer["mlp_norm"]["scale"])
            gate = linear("gate", normed)
            x = x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", normed))
        logits = self._norm(x, params["norm"]["scale"]) @ params.get("head", params["embed"]).T
        return logits + params.get("head_bias", 0), np.stack(keys), np.stack(values), np.stack(inputs)


class _Stream:
    """A row's sequence under a policy; guidance has two of them."""

    def __init__(self, model: Reference, tokens: np.ndarray, prefix_len: int, boundary: int) -> None:
        self.model, self.tokens = model, tokens
        self.prefix, self.boundary = np.arange(len(tokens)) < prefix_len, boundary
        num_layers, config = model.config.num_layers, model.config
        shape = (num_layers, len(tokens), config.num_kv_heads, config.head_dim)
        self.k, self.v = np.zeros(shape), np.zeros(shape)
        self.entering: tuple[int, np.ndarray] | None = None
        if prefix_len:
            _, k, v, inputs = model.run(tokens[:prefix_len])
            self.k[:, :prefix_len], self.v[:, :prefix_len] = k, v
            self.entering = (boundary, inputs[boundary]) if boundary < num_layers else None

    def step(self, refresh: bool, window: np.ndarray, *, block_start: bool) -> np.ndarray:
        """Logits of all positions; `window` are the suffix positions whose keys and values are computed again."""
        shallow = np.arange(self.model.config.num_layers)[:, None] < self.boundary
        where = np.where(self.prefix, shallow | (not refresh), ~window)
        kept = Kept(where, self.k.copy(), self.v.copy())
        logits, k, v, _ = self.model.run(self.tokens, kept, self.entering if refresh else None)
        keep = np.where(self.prefix, refresh, block_start)[None, :, None, None] & ~where[:, :, None, None]
        self.k, self.v = np.where(keep, k, self.k), np.where(keep, v, self.v)
        return logits


@dataclasses.dataclass
class Outcome:
    """Response, forward passes, and the smallest gap that any decision was made by."""

    tokens: tuple[int, ...]
    passes: int
    gap: float


def denoise(
    model: Reference,
    prompt: tuple[int, ...],
    sampling: SamplingConfig,
    *,
    name: str = "",
    prefix_len: int = 0,
    boundary: int = 0,
    refresh_interval: int = 1,
    block_cache: str = "off",
    holes: tuple[tuple[int, int], ...] = (),
) -> Outcome:
    """Denoises one response; `name` and the seed of `sampling` decide the noise.

    With `holes` (position and length), `prompt` is what is known around them, and the tokens are all from the first
    hole on.
    """
    config, size = model.config, sampling.block_size
    holes = holes or ((len(prompt), sampling.gen_length),)
    start, sequence = holes[0][0], list(prompt)
    for place, length in holes:
        sequence[place:place] = [config.mask_id] * length
    masked = [place + i for place, length in holes for i in range(length)]
    prefix_len = min(prefix_len, start - config.shift_logits)
    streams = [_Stream(model, np.asarray(sequence), prefix_len, boundary)]
    if sampling.cfg_scale:
        streams.append(_Stream(model, np.asarray([config.mask_id] * len(sequence)), prefix_len, boundary))
    noise = _Noise(name, sampling.seed, config)
    anchored = config.anchor_blocks and block_cache != "off"
    steps, gap = 0, np.inf
    for block in range(sampling.num_blocks):
        places = np.asarray(masked[block * size : (block + 1) * size])
        sources = np.maximum(places - config.shift_logits, 0)
        block_step = 0
        while (streams[0].tokens[places] == config.mask_id).any():
            counter = block_step if sampling.by_confidence else steps
            window = np.ones(len(sequence), bool)
            if block_cache != "off" and block_step:
                window = np.isin(np.arange(len(sequence)), masked[block * size :])
                window &= np.isin(np.arange(len(sequence)), places) | (block_cache == "prefix")
            found = [s.step(counter % refresh_interval == 0, window, block_start=block_step == 0) for s in streams]
            logits = [each[sources] for each in found]
            guided = logits[0]
            if sampling.cfg_scale:
                guided = logits[1] + (sampling.cfg_scale + 1) * (logits[0] - logits[1])
            tokens, margin, chosen = _pick(
                guided,
                streams[0].tokens[places] == config.mask_id,
                block_step,
                noise.at(steps, block * size, len(places)),
                config,
                sampling,
                anchored=anchored,
                from_outside=~np.isin(sources, places),
            )
            for stream in streams:
                stream.tokens[places[chosen]] = tokens[chosen]
            gap = min(gap, margin)
            steps, block_step = steps + 1, block_step + 1
        for hole, length in holes if sampling.early_stop else ():
            inside = [place for place in places if hole <= place < hole + length]
            ends = [token for token in streams[0].tokens[inside] if token in config.eos_ids]
            for stream in streams if ends else ():
                left = stream.tokens[hole : hole + length]
                left[left == config.mask_id] = ends[0]
    return Outcome(tuple(map(int, streams[0].tokens[start:])), steps, gap)


class _Noise:
    """Standard Gumbel noise by request, step and position, as the library documents it."""

    def __init__(self, name: str, seed: int, config: ModelConfig) -> None:
        first, *others = noise_words(name, seed)
        self._key = functools.reduce(jax.random.fold_in, others, jax.random.key(first))
        self._vocab_size = config.vocab_size

    def at(self, step: int, offset: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise of tokens [W, V] and of their order [W]."""
        tokens, order = _draw(self._key, step, offset, size, self._vocab_size)
        return np.asarray(tokens, np.float64), np.asarray(order, np.float64)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _draw(key: Any, step: int, offset: int, size: int, vocab_size: int) -> tuple[Any, Any]:
    def of_position(place: Any) -> tuple[Any, Any]:
        for_token, for_order = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), place))
        return noise_of(for_token, vocab_size), jax.random.gumbel(for_order)

    return jax.vmap(of_position)(offset + jax.numpy.arange(size))


def noise_of(key: Any, vocab_size: int) -> Any:
    """Standard Gumbel noise of every token, drawn by blocks."""
    blocks = range(-(-vocab_size // head.NOISE_BLOCK))
    drawn = [jax.random.gumbel(jax.random.fold_in(key, block), (head.NOISE_BLOCK,)) for block in blocks]
    return jax.numpy.concatenate(drawn)[:vocab_size]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities; all zero where no token is left, as when all that a filter keeps are ends that do not count."""
    if np.isneginf(logits.max()):
        return np.zeros_like(logits)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def filtered(logits: np.ndarray, sampling: SamplingConfig, sharpness: float) -> np.ndarray:
    """Logits with -inf for what top-p and top-k drop, found by sorting."""
    by_rank = np.sort(logits)[::-1]
    p = softmax(by_rank * sharpness)
    keep = (np.cumsum(p) - p <= (sampling.top_p or 1)) | ((sampling.top_p or 1) == 1)
    keep &= np.arange(len(p)) < (sampling.top_k or len(p))
    return np.where(logits >= by_rank[keep].min(), logits, -np.inf)


def scores_of(
    logits: np.ndarray,
    token_noise: np.ndarray,
    order_noise: float,
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    place: int = 0,
) -> tuple[int, float, float, float, float]:
    """Token at a position, its log-odds, the rule's score, the rule's confidence, and how clear the choice was."""
    dream, t = config.family == "dream", sampling.temperature
    scale, noise = (1 / t, 1.0) if dream and t else (1.0, t)
    ids = np.arange(config.vocab_size)
    is_end = np.isin(ids, config.eos_ids)
    out = is_end & ~np.isin(ids, config.eot_ids) & sampling.logits_eos_inf
    logits = np.where(out, -np.inf, logits * scale)
    choosable = filtered(np.where(ids == config.mask_id, -np.inf, logits), sampling, 1 / (noise or 1))
    noisy = choosable + (noise * token_noise if noise else 0)
    token = int(noisy.argmax())
    clear = float(noisy[token] - np.delete(noisy, token).max())

    counted = choosable.copy()
    if logits[config.mask_id] >= choosable.min(initial=np.inf, where=np.isfinite(choosable)):
        counted[config.mask_id] = logits[config.mask_id]
    deferred = bool(is_end[token] and sampling.confidence_eos_eot_inf)
    if sampling.confidence_eos_eot_inf:
        counted[is_end] = -np.inf
    p = softmax(counted)
    others = counted[np.arange(len(p)) != token]
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.log(np.exp(others - counted.max()).sum()) + counted.max()
        log_odds = -1e30 if deferred else float(counted[token] - rest)
        log_odds = float(np.nan_to_num(log_odds, nan=-1e30, posinf=1e30))
        entropy = -np.nansum(p * np.log(p))
    best = int(np.where(ids == config.mask_id, -np.inf, counted).argmax())
    margin = float(p[best] - np.delete(p, best).max())
    rule = "entropy" if sampling.entropy_bound is not None else sampling.remasking or OWN_RULE[config.family]
    score, confidence = {
        "low_confidence": (log_odds, 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))),
        "topk_margin": (margin, margin),
        "entropy": (-entropy, -entropy),
        "random": (order_noise, 0.0),
        "sequential": (-place, -place),
    }[{"maskgit_plus": "low_confidence", "origin": "random"}.get(rule, rule)]
    if deferred and rule in ("topk_margin", "entropy"):
        score = confidence = -1.0 if rule == "topk_margin" else -1e30
    return token, log_odds, score, confidence, clear


def _pick(
    logits: np.ndarray,
    masked: np.ndarray,
    block_step: int,
    noise: tuple[np.ndarray, np.ndarray],
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    anchored: bool,
    from_outside: np.ndarray,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Tokens of a block's positions, the smallest gap, and the positions that this step unmasks."""
    found = [scores_of(row, *pair, config, sampling) for row, *pair in zip(logits, *noise, strict=True)]
    tokens = np.asarray([each[0] for each in found])
    candidates, anchors = np.flatnonzero(masked), np.flatnonzero(masked & from_outside)
    if anchored and block_step == 0 and len(anchors):
        return tokens, min(found[place][4] for place in anchors), anchors

    def ranked(scores: list[float]) -> list[int]:
        return sorted(candidates, key=lambda place: (-scores[place], place))

    if sampling.entropy_bound is not None:
        order = ranked([each[2] for each in found])
        sums = np.cumsum([-found[place][2] for place in order])
        count = max(1, int((sums < sampling.entropy_bound).sum()))
        edge = min(np.abs(sums - sampling.entropy_bound)[1:], default=np.inf)
    elif sampling.by_confidence:
        score = [each[1] for each in found]
        p = [1 / (1 + np.exp(-np.clip(each, -700, 700))) for each in score]
        order = ranked(score)
        if sampling.threshold is not None:
            limits = [sampling.threshold] * len(order)
        else:
            limits = [1 - (sampling.factor or 0) / (n + 1) for n in range(1, len(order) + 1)]
        count = 1
        while count < len(order) and p[order[count]] >= limits[count]:
            count += 1
        edge = min([abs(p[place] - limit) for place, limit in zip(order, limits, strict=True)][1:], default=np.inf)
        if sampling.factor is not None and count == len(order) - 1:  # as the published loop has it
            count += 1
    else:
        score = [each[2] for each in found]
        if sampling.alg_temperature:
            score = [each[3] / sampling.alg_temperature + g for each, g in zip(found, noise[1], strict=True)]
        order = ranked(score)
        count, edge = _count(len(masked), block_step, noise[1][candidates], config, sampling, anchored=anchored)
        if 0 < count < len(order):
            edge = min(edge, score[order[count - 1]] - score[order[count]])
    chosen = order[:count]
    gap = min([edge, *(found[place][4] for place in chosen)])
    return tokens, float(gap), np.asarray(chosen, int)


def _count(
    size: int, step: int, noise: np.ndarray, config: ModelConfig, sampling: SamplingConfig, *, anchored: bool
) -> tuple[int, float]:
    """How many candidates of a block of `size` masks a step unmasks, by the published schedules."""
    dream, steps = config.family == "dream", sampling.block_steps
    times = np.linspace(1, 1e-3 if dream else 0, steps + 1)
    shares = [*(1 - times[1:-1] / times[:-2]), 1.0]
    if sampling.remasking == "origin":
        uniform = np.exp(-np.exp(-noise))  # the noise of this many positions is above the bar of that share
        return int((uniform > 1 - shares[step]).sum()), float(np.abs(uniform - (1 - shares[step])).min())
    if dream:
        left = size
        for before in range(step):
            left -= 1 if anchored and before == 0 else int(left * shares[before])
        return int(left * shares[step]), np.inf
    return size // steps + (step < size % steps), np.inf
