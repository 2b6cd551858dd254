"""One process of a sharded load, its memory capped: `python tests/load_child.py FOLDER RANK SIZE PORT ALLOWANCE_MIB`.

Prints a JSON object: the checksum of every parameter, which is the same however it is sharded.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden import FOLDERS
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bicache_jax.checkpoints.fields import read_json
from bicache_jax.checkpoints.orbax_folder import checksum
from bicache_jax.checkpoints.targets import Target
from bicache_jax.checkpoints.tree import paths, tree_of
from bicache_jax.loading import load_model, open_checkpoint
from bicache_jax.models import abstract, registered


def wanted(folder: Path, names: frozenset[str], devices: list) -> tuple[dict, dict]:
    """Mapping and shapes of a checkpoint, every matrix divided by its last axis over the devices."""
    config = registered()["llada"].config_from_hf(read_json(folder / "config.json"), names, "config.json")
    mesh = Mesh(np.array(devices), ("model",))

    def leaf(shape: jax.ShapeDtypeStruct) -> Target:
        spec = (None,) * (len(shape.shape) - 1) + ("model",)
        return Target(shape.shape, shape.dtype, NamedSharding(mesh, PartitionSpec(*spec)))

    shapes = tree_of((path, leaf(shape)) for path, shape in paths(abstract(config, jnp.float32)))
    return registered()["llada"].tensor_map(config), shapes


def load(folder: Path, devices: list, *, check: bool = False) -> tuple[dict, int]:
    """Parameters, and the bytes that were read for them."""
    with open_checkpoint(folder) as tensors:
        params = tensors.load(*wanted(folder, tensors.names, devices), check=check)
        return params, getattr(tensors, "bytes_read", 0)


def data_bytes() -> int:
    """Private writable memory of this process: what RLIMIT_DATA counts. Files that are mapped to be read are not."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def main() -> None:
    folder, rank, size, port, allowance = Path(sys.argv[1]), *map(int, sys.argv[2:])
    if size > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", size, rank)
    small = FOLDERS["llada"]
    load(small, jax.devices(), check=True)  # threads and arenas come into being
    load_model(small)
    if allowance:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + allowance * 2**20, most))
    if size > 1:
        params, read = load(folder, jax.devices())
    else:
        params, read = load_model(folder, dtype="float32").params, 0
    held = sum(shard.data.nbytes for _, leaf in paths(params) for shard in leaf.addressable_shards)
    if allowance:  # the programs of the checksums are no part of loading
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    sums = {".".join(path): int(checksum(leaf)) for path, leaf in paths(params)}
    print(json.dumps({"read": read, "held": held, "sums": sums}), flush=True)
    if size > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
