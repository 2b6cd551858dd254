"""Prefix attention behind one function. The choice of implementation is made here and nowhere else."""

from bicache_jax.kernels.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from bicache_jax.kernels.dispatch import PrefixAttention as PrefixAttention
from bicache_jax.kernels.dispatch import prefix_attention as prefix_attention
from bicache_jax.kernels.support import elsewhere as elsewhere
from bicache_jax.kernels.support import refusal as refusal
