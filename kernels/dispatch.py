"""Dispatch of prefix attention to an implementation."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Bool, Float, Int

from bicache_jax import attention

IMPLEMENTATIONS = ("auto", "xla")


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "*L G K P H"],
    v_prefix: Float[Array, "*L G K P H"],
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    *,
    prefix_index: Int[Array, " B"] | None = None,
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N T H"]:
    """Prefix attention; `bicache_jax.attention.prefix_attention` is its specification.

    Args:
        q: queries, rotated.
        k_prefix: prefix keys, rotated; `[G, K, P, H]`, or the stack `[L, G, K, P, H]` when `layer` is given.
        v_prefix: prefix values, like `k_prefix`.
        k_suffix: suffix keys, rotated.
        v_suffix: suffix values.
        prefix_index: which prefix a row uses; None: each row its own (G = B).
        prefix_len: valid tokens of each prefix, 0 allowed.
        suffix_valid: which suffix tokens may be attended to.
        scale: factor of the scores; None: `H ** -0.5`.
        layer: layer of a stacked prefix cache; may be traced.
        implementation: `xla` is the plain-JAX specification; `auto` picks the best for the platform.

    Returns:
        Attended values in `q`'s dtype.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return attention.prefix_attention(
        q,
        k_prefix,
        v_prefix,
        k_suffix,
        v_suffix,
        prefix_index=prefix_index,
        prefix_len=prefix_len,
        suffix_valid=suffix_valid,
        scale=scale,
        layer=layer,
    )


@dataclasses.dataclass(frozen=True)
class PrefixAttention:
    """`prefix_attention` with its implementation chosen: a hashable value, so that it can be a static argument."""

    implementation: str = "auto"

    def __call__(self, *args: Array, **kwargs: object) -> Array:
        """Attends."""
        return prefix_attention(*args, **kwargs, implementation=self.implementation)  # type: ignore[arg-type]
