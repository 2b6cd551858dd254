"""A baseline outside this library: the same weights in PyTorch, through `transformers`' Llama modules.

`scaled_dot_product_attention` under a full mask, no cache, the current block's logits only, and LLaDA's low-confidence
loop. It needs the extra `torch`.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from bicache_jax.core.types import BicacheError, Model
from bicache_jax.decoding.schedule import even_counts
from bicache_jax.measure.benchmark import Case, synthetic_requests
from bicache_jax.serving.flops import Job, row_flops

# transformers' names of a layer's tensors -> where they are in the parameter tree
_LAYER = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}

_LOOP = ("low_confidence", "even", False, False)  # rule, schedule, shifted logits and tied head of what runs here


class TorchRunner:
    """Runs a case in PyTorch; see `bicache_jax.measure.benchmark.Runner`."""

    def __init__(self, model: Model, case: Case) -> None:
        """Copies the weights.

        Raises:
            BicacheError: PyTorch or transformers is missing, or the architecture is not the Llama block.
        """
        try:
            import torch
            from transformers import LlamaConfig, LlamaModel
        except ImportError as error:
            raise BicacheError(
                f"--baseline torch: {error.name} is not installed; pip install 'bicache-jax[torch]'"
            ) from None
        config = model.config
        plain = (config.remasking, config.schedule, config.shift_logits, config.tied) == _LOOP
        if not plain or config.qkv_bias or config.bias or config.norm_bias or config.head_bias:
            raise BicacheError("--baseline torch: only models that decode as LLaDA-8B, and have no biases, run there")
        self._torch, self._case, self._config = torch, case, config
        self._device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, str(model.params["embed"].dtype))
        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_length,
            attn_implementation="sdpa",
        )
        self._model = LlamaModel(shape).to(self._device, dtype).eval()
        self._model.load_state_dict(_state(model.params, torch, dtype))
        for layer in self._model.layers:
            layer.self_attn.is_causal = False
        self._head = _tensor(model.params["head"], torch, dtype).to(self._device)

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
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=self._device)
        with torch.inference_mode():
            for step in range(steps):
                block, inside = divmod(step, sampling.num_steps // blocks)
                begin = prompts.shape[1] + block * sampling.block_size
                part = slice(begin, begin + sampling.block_size)
                hidden = self._model(input_ids=ids, attention_mask=everything, use_cache=False).last_hidden_state
                logits = (hidden[:, part] @ self._head.T).float()
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


def _tensor(array: Any, torch: Any, dtype: Any) -> Any:
    return torch.from_numpy(np.array(array, np.float32)).to(dtype)


def _state(params: Any, torch: Any, dtype: Any) -> dict[str, Any]:
    """Parameters under transformers' names."""
    state = {
        "embed_tokens.weight": _tensor(params["embed"], torch, dtype),
        "norm.weight": _tensor(params["norm"]["scale"], torch, dtype),
    }
    layers = params["layers"]
    for index in range(layers["q"]["weight"].shape[0]):
        at = f"layers.{index}."
        for name, ours in _LAYER.items():
            linear = layers[ours]
            weight = linear["weight"][index] if "weight" in linear else linear["kernel"][index].T
            state[at + name + ".weight"] = _tensor(weight, torch, dtype)
        state[at + "input_layernorm.weight"] = _tensor(layers["attention_norm"]["scale"][index], torch, dtype)
        state[at + "post_attention_layernorm.weight"] = _tensor(layers["mlp_norm"]["scale"][index], torch, dtype)
    return state
