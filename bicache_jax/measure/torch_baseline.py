"""A baseline outside this library: the same weights in PyTorch.

The transformer of LLaDA-8B in PyTorch's own functions, with `scaled_dot_product_attention` over the whole canvas (no
mask: every token sees every other), no cache, the current block's logits only, and LLaDA's low-confidence loop.
`torch+compile` is the same through `torch.compile`. PyTorch reads JAX's arrays where both run on one device, so weights
are there once. It needs the extra `torch`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.decoding.schedule import even_counts
from bicache_jax.measure.benchmark import Case, synthetic_requests
from bicache_jax.serving.flops import Job, row_flops

BASELINES = ("torch", "torch+compile")
"""Names of the programs, as `bicache benchmark --baseline` takes them."""

_LOOP = ("low_confidence", "even", False, False)  # rule, schedule, shifted logits and tied head of what runs here


def missing(model: Model) -> str | None:
    """Why a model does not run in PyTorch here; None if it does."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install 'bicache-jax[torch]'"
    config = model.config
    plain = (config.remasking, config.schedule, config.shift_logits, config.tied) == _LOOP
    if not plain or config.qkv_bias or config.bias or config.norm_bias or config.head_bias or config.qk_norm:
        return "only models that decode as LLaDA-8B, and have no biases, run there"
    if model.params["embed"].dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "only weights that are not quantized run there"
    return None


class TorchRunner:
    """Runs a case in PyTorch; see `bicache_jax.measure.benchmark.Runner`."""

    def __init__(self, model: Model, case: Case) -> None:
        """Hands over the weights.

        Args:
            model: the model.
            case: what to run; its policy is one of `BASELINES`.

        Raises:
            BicacheError: PyTorch is missing, or the architecture is not LLaDA-8B's.
        """
        if why := missing(model):
            raise BicacheError(f"--baseline torch: {why}")
        import torch

        self._torch, self._case, self._config = torch, case, model.config
        self._device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        self._weights = _weights(model.params, model.config, torch, self._device)
        forward = _forward(torch, model.config)
        self._hidden = torch.compile(forward) if case.policy == "torch+compile" else forward

    def prepare(self) -> None:
        """Warms up."""
        self.first_token()

    def run(self) -> float:
        """Denoises all rows."""
        return self.timed(self._case.sampling.num_steps)

    def first_token(self) -> float:
        """One step."""
        return self.timed(1)

    def timed(self, steps: int) -> float:
        """Seconds of the first `steps` denoising steps."""
        started = time.perf_counter()
        self.generate(steps)
        return time.perf_counter() - started

    def generate(self, steps: int) -> np.ndarray:
        """The canvases [B, gen_length] after the first `steps` denoising steps."""
        torch, sampling = self._torch, self._case.sampling
        requests = synthetic_requests(self._config, self._case)
        prompts = torch.tensor([request.prompt_ids for request in requests], device=self._device)
        masks = torch.full((len(requests), sampling.gen_length), self._config.mask_id, device=self._device)
        ids = torch.cat([prompts, masks], dim=1)
        blocks = sampling.num_blocks
        counts = even_counts(sampling.block_size, sampling.num_steps // blocks)
        cos, sin = _rotary(torch, self._config, ids.shape[1], self._device)
        with torch.inference_mode():
            for step in range(steps):
                block, inside = divmod(step, sampling.num_steps // blocks)
                begin = prompts.shape[1] + block * sampling.block_size
                part = slice(begin, begin + sampling.block_size)
                hidden = self._hidden(self._weights, ids, cos, sin)
                logits = (hidden[:, part] @ self._weights["head"].T).float()
                allowed = logits.clone()
                allowed[..., self._config.mask_id] = -torch.inf
                token = allowed.argmax(-1)
                score = torch.gather(logits.softmax(-1), -1, token[..., None])[..., 0]
                score = torch.where(ids[:, part] == self._config.mask_id, score, -torch.inf)
                chosen = score.topk(int(counts[inside]), dim=-1).indices + begin
                ids.scatter_(1, chosen, torch.gather(token, 1, chosen - begin))
            return ids[:, prompts.shape[1] :].cpu().numpy()

    def facts(self) -> dict[str, Any]:
        """What is known of the case apart from its time."""
        case = self._case
        job = Job(0, case.prefix + case.suffix, case.sampling.num_steps, case.sampling.block_size)
        return {
            "boundary": None,
            "flops": row_flops(self._config, job) * case.rows,
            "memory_bytes": None,
            "cache_bytes": None,
            "compile_s": None,
            "dispatches": None,
            "forward_passes": case.rows * case.sampling.num_steps,
            "first_token_kept_s": None,
        }


def _rotary(torch: Any, config: ModelConfig, length: int, device: str) -> tuple[Any, Any]:
    """Cosines and sines of all positions, [T, H] each."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, device=device)[:, None] * config.rope_theta**-half
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _forward(torch: Any, config: ModelConfig) -> Callable[..., Any]:
    """The hidden states [B, T, D] behind the last norm, of weights, tokens [B, T] and `_rotary`'s tables."""
    functional = torch.nn.functional

    def norm(x: Any, scale: Any) -> Any:
        return functional.rms_norm(x, scale.shape, scale, config.norm_eps)

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    def hidden(params: Any, ids: Any, cos: Any, sin: Any) -> Any:
        x = params["embed"][ids]
        for layer in params["layers"]:
            y = norm(x, layer["attention_norm"])
            q, k, v = (heads(functional.linear(y, layer[name])) for name in ("q", "k", "v"))
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            grouped = config.num_heads != config.num_kv_heads
            seen = functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            x = x + functional.linear(seen.transpose(1, 2).flatten(-2), layer["o"])
            y = norm(x, layer["mlp_norm"])
            gated = functional.silu(functional.linear(y, layer["gate"])) * functional.linear(y, layer["up"])
            x = x + functional.linear(gated, layer["down"])
        return norm(x, params["norm"])

    return hidden


def _weights(params: Any, config: ModelConfig, torch: Any, device: str) -> dict[str, Any]:
    """The weights as PyTorch's; a layer's are views of the stack."""
    there = jax.tree.map(lambda array: torch.from_dlpack(array).to(device), params)

    def weight(found: Any, index: int) -> Any:
        if "scale" in found:
            return found["scale"][index]
        return found["weight"][index] if "weight" in found else found["kernel"][index].T

    layers = [
        {name: weight(found, index) for name, found in there["layers"].items()} for index in range(config.num_layers)
    ]
    return {"embed": there["embed"], "head": there["head"], "norm": there["norm"]["scale"], "layers": layers}
