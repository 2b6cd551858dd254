"""The vocabulary of the library: frozen configuration types, all hashable and safe as static arguments of `jax.jit`."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

Policy = Literal["auto", "none", "naive", "bicache", "exact"]
BlockCache = Literal["off", "prefix", "dual"]
Remasking = Literal["low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin", "sequential"]
Schedule = Literal["even", "time", "linear"]
AttentionKind = Literal["full", "block_causal"]
Quantize = Literal["none", "w8", "w8a8"]
QUANTIZE: tuple[Quantize, ...] = typing.get_args(Quantize)
"""Formats of weights: `w8` in 8 bits, `w8a8` also the activations that they are multiplied with."""
CacheDtype = Literal["auto", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = typing.get_args(CacheDtype)
"""Forms of cached prefix KV: `auto` in the model's dtype, `int8` in 8 bits (`bicache_jax.core.kv`)."""
BLOCK_CACHES: tuple[BlockCache, ...] = ("off", "prefix", "dual")
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of parameters and caches; `auto`: float32 on CPUs, float16 on GPUs that have no bfloat16, else bfloat16."""
ATTENTION = ("auto", "xla", "pallas_tpu", "pallas_gpu")
"""Implementations of prefix attention; see `bicache_jax.kernels.prefix_attention`."""
POLICIES: tuple[Policy, ...] = ("none", "naive", "bicache", "exact")
Criterion = Literal["similarity", "answers"]
CRITERIA: tuple[Criterion, ...] = typing.get_args(Criterion)
"""What boundaries are chosen by: `similarity` of keys and values, as published, or what caches do to `answers`."""
PrefixDetection = Literal["auto", "messages", "off"]
PREFIX_DETECTIONS: tuple[PrefixDetection, ...] = ("auto", "messages", "off")
CACHED_BLOCK = 32
"""Block length under a block cache where none is given (Fast-dLLM, arXiv 2505.22618)."""
MOST_EDITS = 16
"""Passes that may edit a block without masks, at most (LLaDA2.1's `max_post_steps`)."""
REFRESH_INTERVAL = 16
"""Refresh interval without a block cache where none is given (BiCache, arXiv 2606.07571)."""
REMASKING: tuple[Remasking, ...] = typing.get_args(Remasking)
CONFIDENCE_RULES = ("threshold", "factor", "entropy_bound")
"""Settings of `SamplingConfig` of which one may say how many tokens a step unmasks, in place of the schedule."""
SCHEDULES: tuple[Schedule, ...] = ("even", "time", "linear")


@functools.cache
def field_kinds(config: type[Any]) -> dict[str, tuple[Any, ...]]:
    """What each field of a configuration may be: types, `NoneType` for None, and literals of words."""
    found = {}
    for name, hint in typing.get_type_hints(config).items():
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        found[name] = members
    return found


def _takes(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str)  # which word it is, the configuration checks
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)


_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string", types.NoneType: "None"}


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return _WORDS.get(kind, "a mapping")


def _check_types(config: Any) -> None:
    """Refuses fields of a wrong type; numbers of NumPy become Python's, which have a hash and a JSON form.

    Raises:
        TypeError: a field is of another type than its annotation says.
    """
    for name, kinds in field_kinds(config.__class__).items():
        value = getattr(config, name)
        if not any(_takes(kind, value) for kind in kinds):
            raise TypeError(f"{name} must be {' or '.join(map(_in_words, kinds))}, got {value!r:.80}")
        if isinstance(value, numbers.Number) and hasattr(value, "item"):
            object.__setattr__(config, name, value.item())


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        num: E, experts of a layer.
        per_token: k, those that each token runs through.
        d_expert: width of each.
        d_shared: width of what every token runs through in addition; 0: nothing.
        dense_layers: layers that have an MLP of width `d_mlp` instead.
        score: what the router's logits become: `softmax` over the experts, or `sigmoid` of each.
        renormalise: whether the weights of a token's experts are divided by their sum.
        scale: factor of these weights.
        bias: whether a bias is added where experts are picked; their weights are without it.
        groups: groups of experts of which a token's come from `top_groups`, those whose two best are best together.
        top_groups: see there.
        cut: how a mesh cuts them: the width of each (`width`), or into as many sets as there are shards (`expert`).
        held: experts that are here, on a shard; None: all.
    """

    num: int
    per_token: int
    d_expert: int
    d_shared: int = 0
    dense_layers: tuple[int, ...] = ()
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    cut: Literal["width", "expert"] = "width"
    held: int | None = None

    @property
    def here(self) -> int:
        """Experts of a layer that are here: all, or a shard's."""
        return self.num if self.held is None else self.held

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num:
            raise ValueError(f"experts per token must be from 1 to {self.num}, got {self.per_token}")
        if self.num % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"{self.num} experts cannot be picked from {self.top_groups} of {self.groups} groups")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A diffusion LM, whatever its family: its architecture, and what its published loop does unless it is told.

    A family differs from others by these fields alone: no code but `bicache_jax.models` asks for its name.

    Attributes:
        family: name of its family (`bicache_jax.register_family`), which makes its backbone and maps its checkpoints.
            Any word will do where a `Model` brings its backbone along.
        vocab_size: V, rows of the embedding and of the head (padding rows of the checkpoint included).
        d_model: D, width of the residual stream.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; divides N.
        head_dim: H.
        d_mlp: F, width of the SwiGLU MLP.
        rope_theta: base of the rotary embedding.
        norm_eps: epsilon of every RMSNorm.
        max_length: longest sequence (prompt + response) the checkpoint was made for.
        mask_id: id of the mask token.
        eos_ids: ids that end a response.
        eot_ids: those of `eos_ids` that end a turn of a chat rather than the text.
        qkv_bias: whether query, key and value projections have a bias.
        bias: whether the attention output and the MLP projections have a bias.
        norm_bias: whether the norms have a bias.
        head_bias: whether the head has a bias.
        qk_norm: whether queries and keys are normalised per head (Qwen3).
        rotary_dim: dimensions of each head that are rotated, the first ones; 0: all.
        experts: the mixture of experts in place of the MLP; None: every layer has an MLP.
        tied: whether the head is the embedding.
        shift_logits: whether position j is predicted from hidden state j - 1 (Dream).
        anchor_blocks: whether, with a block cache, the pass at a block's start fixes the block's first token whatever
            its confidence, since the token before it lies outside of the block (Fast-dLLM's loop for Dream).
        quantize: format of the weights of projections, experts, embedding and head; norms and routers stay floats.
        remasking: the unmasking rule where a request names none.
        schedule: how many tokens a step unmasks (`bicache_jax.decoding.schedule`): `even` as many in each (LLaDA),
            `time` a share of those left that follows from the step's time (Dream), `linear` the nearest whole number to
            the same share of those left (A2D).
        time_eps: time of the last step, for `schedule="time"` and the rule `origin`.
        attention: `full`: every token sees every other; `block_causal`: those of its own block and of earlier ones.
        block_length: tokens of a block where a request names none, under block-causal attention.
        padded_prompt: whether blocks are counted from the start of the response, so that the prompt's first one may be
            shorter (BD3LM, which pads it on its left); if not, from the start of the prompt, whose last block the
            response then completes (SDAR, LLaDA2).
        pad_id: a token that nothing sees and no position counts, once its block is done (BD3LM's padding); None: none.
        tempered_confidence: whether a temperature divides the logits, so that confidence is the probability at it
            (Dream). If not, it scales the noise, and confidence is the probability at temperature 1 (LLaDA).
    """

    family: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    rope_theta: float
    norm_eps: float
    max_length: int
    mask_id: int
    eos_ids: tuple[int, ...] = ()
    eot_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    bias: bool = False
    norm_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int = 0
    experts: Experts | None = None
    tied: bool = False
    shift_logits: bool = False
    anchor_blocks: bool = False
    quantize: Quantize = "none"
    remasking: Remasking = "low_confidence"
    schedule: Schedule = "even"
    time_eps: float = 0.0
    attention: AttentionKind = "full"
    block_length: int = CACHED_BLOCK
    padded_prompt: bool = False
    pad_id: int | None = None
    tempered_confidence: bool = False

    @property
    def block_causal(self) -> bool:
        """Whether a token sees nothing behind its block, so that caches are exact."""
        return self.attention == "block_causal"

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """Layers that have a mixture of experts."""
        dense = range(self.num_layers) if self.experts is None else self.experts.dense_layers
        return tuple(layer for layer in range(self.num_layers) if layer not in dense)

    @property
    def mlp_columns(self) -> float:
        """Columns of the MLP, or of the experts, that a token runs through here; the mean over layers and shards."""
        experts = self.experts
        return self._mean_columns(0 if experts is None else experts.per_token * experts.here / experts.num)

    @property
    def mlp_weights(self) -> float:
        """Columns of the MLP, or of all experts, that there are in a layer; the mean over the layers."""
        return self._mean_columns(0 if self.experts is None else self.experts.here)

    def _mean_columns(self, experts: float) -> float:
        """Columns of a layer's MLP, or of so many experts and the shared ones; the mean over the layers."""
        if self.experts is None:
            return self.d_mlp
        mixtures = len(self.mixture_layers)
        mixed = mixtures * (experts * self.experts.d_expert + self.experts.d_shared)
        return ((self.num_layers - mixtures) * self.d_mlp + mixed) / self.num_layers

    @property
    def shifted(self) -> int:
        """Prompt tokens that a suffix keeps in front of its response: 1 where logits are shifted, else 0."""
        return int(self.shift_logits)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads=} and {self.num_heads=}")
        if self.head_dim % 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary embedding needs even sizes, got {self.head_dim=} and {self.rotary_dim=}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id must be a token of the vocabulary, got {self.mask_id=} and {self.vocab_size=}")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {self.remasking!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not 0.0 <= self.time_eps < 1.0:
            raise ValueError(f"time_eps must lie in [0, 1), got {self.time_eps}")
        if self.attention not in typing.get_args(AttentionKind):
            raise ValueError(f"attention must be 'full' or 'block_causal', got {self.attention!r}")
        if self.block_length < 1:
            raise ValueError(f"block_length must be >= 1, got {self.block_length}")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How the KV of a shared prefix are reused.

    Attributes:
        policy: `none` (no prefix cache), `naive` (b = L, as an LLM would) or `bicache`; under block-causal attention
            `exact` (what is finished is kept, and never changes) or `none`. `auto`: `bicache` or `exact`, whichever the
            model's attention allows.
        boundary: b, layers `0..b-1` reuse the prefix-alone KV; `auto` takes b from the boundary table.
        table: boundary table `{r: b}` with r in percent; used when `boundary` is `auto`. None: the model's own.
        refresh_interval: N, denoising steps from one recomputation of the deep prefix KV to the next; `auto` depends on
            the block cache (see `interval`).
        block_cache: `dual` freezes everything outside the current block until the block is done, `prefix` everything
            before it (Fast-dLLM, arXiv 2505.22618); `off` freezes nothing.
        batch_boundary: `own` batches only rows of equal b; `min` may merge rows at their smallest b.
        min_prefix: shortest automatically detected prefix (tokens) that is worth a cache of its own.
        prefix_detection: where a prefix comes from. `auto`: a request's own (`prefix_len`, its messages, its whole
            prompt if it asks for several samples), else what it shares with the other requests of the call. `messages`:
            its own only. `off`: `prefix_len` only. A request gets the same tokens wherever its prefix is the same, so
            with `messages` and `off` it gets the same ones alone and in any call.
        cache_dtype: how the KV of prefixes are stored, shared ones and those of each row: `auto` in the model's dtype,
            `int8` in 8 bits with a scale for each token and head. Suffixes, the KV of a block cache among them, stay in
            the model's dtype, and so do hidden states.
    """

    policy: Policy = "auto"
    boundary: int | Literal["auto"] = "auto"
    table: Mapping[int, int] | None = dataclasses.field(default=None, hash=False)
    refresh_interval: int | Literal["auto"] = "auto"
    block_cache: BlockCache = "off"
    batch_boundary: Literal["own", "min"] = "own"
    min_prefix: int = 16
    prefix_detection: PrefixDetection = "auto"
    cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        _check_types(self)
        if self.policy not in ("auto", *POLICIES):
            raise ValueError(f"policy must be one of auto, {', '.join(POLICIES)}, got {self.policy!r}")
        if self.boundary != "auto" and (isinstance(self.boundary, str) or self.boundary < 0):
            raise ValueError(f"boundary must be 'auto' or an integer >= 0, got {self.boundary!r}")
        if self.policy in ("none", "exact") and self.boundary != "auto":
            why = "keeps no prefix cache" if self.policy == "none" else "reuses a prefix in all layers"
            raise ValueError(f"policy {self.policy!r} {why}, so it takes no boundary")
        interval = self.refresh_interval
        if interval != "auto" and (isinstance(interval, str) or interval < 1):
            raise ValueError(f"refresh_interval must be 'auto' or an integer >= 1, got {interval!r}")
        if self.block_cache not in BLOCK_CACHES:
            raise ValueError(f"block_cache must be one of {', '.join(BLOCK_CACHES)}, got {self.block_cache!r}")
        if self.batch_boundary not in ("own", "min"):
            raise ValueError(f"batch_boundary must be 'own' or 'min', got {self.batch_boundary!r}")
        for ratio, boundary in (self.table or {}).items():
            if not (isinstance(ratio, numbers.Integral) and isinstance(boundary, numbers.Integral)):
                raise TypeError(f"table must map ratios in percent to boundaries, got {ratio!r}: {boundary!r}")
        if self.min_prefix < 1:
            raise ValueError(f"min_prefix must be >= 1, got {self.min_prefix}")
        if self.prefix_detection not in PREFIX_DETECTIONS:
            raise ValueError(
                f"prefix_detection must be one of {', '.join(PREFIX_DETECTIONS)}, got {self.prefix_detection!r}"
            )
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}")

    def for_model(self, config: ModelConfig) -> CacheConfig:
        """The settings with the policy that a model's attention asks for where they name none.

        Raises:
            ValueError: the policy is not one for such attention.
        """
        if not config.block_causal:
            if self.policy == "exact":
                raise ValueError("policy 'exact' is for block-causal attention: this model's is full (bicache, none)")
            return dataclasses.replace(self, policy="bicache") if self.policy == "auto" else self
        if self.policy in ("naive", "bicache") or self.boundary != "auto" or self.table is not None:
            raise ValueError(
                "this model's attention is block-causal: its caches are exact and take no boundary (policy exact, none)"
            )
        if self.policy != "exact" and self.block_cache != "off":
            raise ValueError(
                "this model's attention is block-causal: policy exact keeps its blocks, without block_cache"
            )
        return self if self.policy == "none" else dataclasses.replace(self, policy="exact", block_cache="dual")

    def default_block(self, gen_length: int, config: ModelConfig | None = None) -> int:
        """Tokens of a block where none are named: the response, at most `CACHED_BLOCK` of it with a block cache.

        Under block-causal attention they are the model's own.
        """
        if config is not None and config.block_causal:
            return config.block_length
        return gen_length if self.block_cache == "off" else min(CACHED_BLOCK, gen_length)

    def with_blocks(
        self, sampling: SamplingConfig, config: ModelConfig | None = None, *, even: bool = True
    ) -> SamplingConfig:
        """The settings with the block length that the cache or the model implies where they name none.

        Args:
            sampling: the settings.
            config: the model; None: one of full attention.
            even: refuse a last block that is shorter, where the published loops do. The holes of a template are as long
                as they are, so that it may have one.

        Raises:
            ValueError: lengths and steps do not go together.
        """
        causal = config is not None and config.block_causal
        if sampling.block_length is None and (causal or self.block_cache != "off"):
            block = self.default_block(sampling.gen_length, config)
            sampling = dataclasses.replace(sampling, block_length=block)
        if even and (config is None or not (causal or config.schedule == "linear")):
            sampling.check_even()
        if sampling.editing_threshold is not None and not causal:
            raise ValueError("editing_threshold is for block-causal attention: this model's is full")
        return sampling

    def interval(self, sampling: SamplingConfig) -> int:
        """N of rows with these decoding settings.

        `auto` is `REFRESH_INTERVAL` without a block cache. With one it is a block's steps: a block begins with a pass
        over the whole suffix, and a refresh inside it gains little for its cost.
        """
        if self.refresh_interval != "auto":
            return self.refresh_interval
        if self.block_cache == "off":
            return REFRESH_INTERVAL
        if sampling.by_confidence:  # as many as there are tokens, and the counter restarts at each block
            return sampling.block_size
        return sampling.block_steps


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a canvas is denoised (LLaDA, arXiv 2502.09992, section 2.4 and appendix A).

    Attributes:
        gen_length: response tokens.
        steps: denoising steps over the whole response; None: one token a step.
        block_length: tokens of a semi-autoregressive block; None: the whole response.
        temperature: 0 takes the argmax; above, tokens are drawn from the softmax at this temperature. Confidence is
            the probability at temperature 1 for LLaDA, and at this temperature for Dream
            (`ModelConfig.tempered_confidence`).
        remasking: which masked tokens are unmasked first (`bicache_jax.decoding.rules`); None: the model's own rule
            (`ModelConfig.remasking`), `low_confidence` for LLaDA and `entropy` for Dream.
        seed: seed of the noise; a request's own seed replaces it.
        threshold: softmax probability from which a token is unmasked at once (Fast-dLLM, arXiv 2505.22618); a step
            unmasks at least the most probable one, and `steps` then means nothing. None: by schedule. Under
            block-causal attention (SDAR, LLaDA2) a step unmasks at least as many as the schedule says, and the
            probability must be above the threshold.
        factor: f, in place of a threshold: the n most probable tokens are unmasked for the largest n with
            `(n + 1) * (1 - p_n) <= f` (Fast-dLLM, section 3.3); at least one is, and `steps` mean nothing.
        entropy_bound: nats, in place of a threshold: tokens are unmasked by ascending entropy while their entropies add
            up to less (after the EB-Sampler, arXiv 2505.24857); at least one is, and `steps` mean nothing.
        alg_temperature: 0 unmasks by rank; above, positions are drawn without replacement with odds
            `exp(confidence / alg_temperature)` (Dream's `alg_temp`).
        top_p: keep the smallest set of most probable tokens that holds more than this share of the probability
            (nucleus sampling, arXiv 1904.09751). The others are gone before tokens are drawn and confidence is taken.
        top_k: keep the k most probable tokens, likewise.
        cfg_scale: w of classifier-free guidance: logits become `u + (w + 1) * (c - u)`, u those with the prompt masked
            (LLaDA's loop); a pass runs both. 0: no guidance.
        logits_eos_inf: never choose an end-of-text token (LLaDA, appendix B.4).
        confidence_eos_eot_inf: unmask end-of-text and end-of-turn tokens after all others (LLaDA, appendix B.4).
        early_stop: a row ends with the first finished block that holds an end-of-text token, and the rest is filled
            with that token. What comes before it is the same either way.
        steps_per_block: denoising steps of a block, in place of `steps`.
        suppress_tokens: tokens that are never chosen, and count for no confidence.
        editing_threshold: probability above which a token of the current block is replaced by the one that the model
            now prefers; a block then ends with a pass that changes nothing (LLaDA2.1). None: what is placed stays.
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking | None = None
    seed: int = 0
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    alg_temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    early_stop: bool = False
    steps_per_block: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    editing_threshold: float | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if self.gen_length < 1:
            raise ValueError(f"gen_length must be >= 1, got {self.gen_length}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be >= 1, got {self.block_length}")
        if self.steps_per_block is not None and self.steps_per_block < 1:
            raise ValueError(f"steps_per_block must be >= 1, got {self.steps_per_block}")
        if self.steps_per_block is not None and self.steps is not None:
            raise ValueError("steps_per_block and steps say the same thing: give one of them")
        if self.editing_threshold is not None and not 0.0 < self.editing_threshold <= 1.0:
            raise ValueError(f"editing_threshold must lie in (0, 1], got {self.editing_threshold}")
        if not all(isinstance(token, numbers.Integral) for token in self.suppress_tokens):
            raise TypeError(f"suppress_tokens must be token ids, got {self.suppress_tokens!r:.80}")
        for name in ("temperature", "alg_temperature", "cfg_scale"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")
        for name in ("factor", "entropy_bound"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        given = [name for name in CONFIDENCE_RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two rules for the same thing: give one of them")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if self.remasking is not None and self.remasking not in REMASKING:
            raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {self.remasking!r}")

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.gen_length if self.block_length is None else self.block_length

    @property
    def num_blocks(self) -> int:
        """Blocks of the response; the last one may be shorter."""
        return -(-self.gen_length // self.block_size)

    @property
    def last_block_size(self) -> int:
        """Tokens of the last block."""
        return self.gen_length - (self.num_blocks - 1) * self.block_size

    @property
    def block_steps(self) -> int:
        """Denoising steps of a block."""
        if self.steps_per_block is not None:
            return min(self.steps_per_block, self.block_size)
        return self.block_size if self.steps is None else -(-self.steps // self.num_blocks)

    def check_even(self) -> None:
        """Refuses what loops with blocks of one length, and as many steps in each, do not have.

        Raises:
            ValueError: the last block would be shorter, or blocks would have different steps.
        """
        if self.gen_length % self.block_size:
            raise ValueError(
                f"gen_length must be a multiple of block_length, got {self.gen_length} and {self.block_length}"
            )
        if self.num_steps % self.num_blocks:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, got {self.num_steps} steps for "
                f"{self.num_blocks} blocks of {self.block_size} tokens"
            )

    @property
    def by_confidence(self) -> bool:
        """Whether confidence alone decides how many tokens a step unmasks."""
        return any(getattr(self, name) is not None for name in CONFIDENCE_RULES)

    @property
    def guided(self) -> bool:
        """Whether rows run twice, with and without their prompt."""
        return self.cfg_scale > 0

    @property
    def num_steps(self) -> int:
        """Denoising steps over the whole response."""
        if self.steps_per_block is not None:
            return self.block_steps * self.num_blocks
        return self.gen_length if self.steps is None else self.steps
