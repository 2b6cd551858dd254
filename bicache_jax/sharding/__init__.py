"""Meshes `("data", "model")`, and how parameters and the programs' arrays are placed on them."""

from bicache_jax.sharding.meshes import DATA as DATA
from bicache_jax.sharding.meshes import MODEL as MODEL
from bicache_jax.sharding.meshes import check_mesh as check_mesh
from bicache_jax.sharding.meshes import make_mesh as make_mesh
from bicache_jax.sharding.meshes import mesh_sizes as mesh_sizes
from bicache_jax.sharding.partition import Partition as Partition
from bicache_jax.sharding.partition import param_shardings as param_shardings
from bicache_jax.sharding.partition import param_specs as param_specs
from bicache_jax.sharding.partition import shard_params as shard_params
from bicache_jax.sharding.shards import PER_SHARD as PER_SHARD
from bicache_jax.sharding.shards import PREFIX as PREFIX
from bicache_jax.sharding.shards import REPLICATED as REPLICATED
from bicache_jax.sharding.shards import STATE as STATE
from bicache_jax.sharding.shards import on_shards as on_shards
from bicache_jax.sharding.shards import prefix_specs as prefix_specs
