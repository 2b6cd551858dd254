"""Makes a boundary table from the similarity of prefix KV, layer by layer, at each prefix ratio.

BiCache, arXiv 2606.07571, section 4.2: a layer is shallow while the mean cosine similarity of prefix-only and
full-sequence KV is above a threshold; b(r) is the number of leading shallow layers, made non-decreasing in r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.boundary import BoundaryTable
from bicache_jax.core.buckets import length_bucket
from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import BicacheError, Model, Request
from bicache_jax.measure.similarity import layer_similarity
from bicache_jax.serving.admission import Asked, admit
from bicache_jax.serving.grouping import detect_prefixes
from bicache_jax.serving.requests import Parser
from bicache_jax.wiring import backbone_here

THRESHOLD = 0.97
ROWS = 4


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sequence to measure.

    Attributes:
        ids: its tokens.
        prefix_len: number of tokens in the prefix.
        ratio: r in percent, rounded down to a multiple of the step between ratios.
    """

    ids: tuple[int, ...]
    prefix_len: int
    ratio: int


def _floor(prefix_len: int, total: int, step: int) -> int:
    return round(100 * prefix_len / total) // step * step


def samples_of_requests(
    requests: Sequence[Request],
    *,
    ratio_step: int,
    per_ratio: int,
    mask_id: int,
    with_response: bool,
    min_prefix: int = 16,
) -> list[Sample]:
    """Calibration sequences from requests: prefix and rest of the prompt.

    Args:
        requests: requests; prefixes that are not given are detected.
        ratio_step: step between ratios.
        per_ratio: largest number of samples per ratio.
        mask_id: the mask token.
        with_response: append the masked response to the prompt.
        min_prefix: shortest prefix that is detected.

    Returns:
        Samples, in order; requests without a prefix are skipped.
    """
    taken: dict[int, int] = {}
    samples = []
    for request, prefix_len in zip(
        requests, detect_prefixes(requests, min_prefix=min_prefix, min_suffix=0), strict=True
    ):
        ids = request.canvas(mask_id) if with_response else request.prompt_ids
        ratio = _floor(prefix_len, len(ids), ratio_step)
        if 0 < prefix_len < len(ids) and taken.get(ratio, 0) < per_ratio:
            taken[ratio] = taken.get(ratio, 0) + 1
            samples.append(Sample(ids, prefix_len, ratio))
    return samples


def synthetic_samples(
    texts: Sequence[Sequence[int]], *, ratio_step: int, per_ratio: int, seed: int, most_tokens: int
) -> list[Sample]:
    """Calibration sequences from any text: random texts, split at every ratio.

    Args:
        texts: tokens of each text.
        ratio_step: step between ratios.
        per_ratio: samples per ratio.
        seed: random seed.
        most_tokens: longer texts are cut to a random part of this length.

    Returns:
        Samples by ratio; texts too short to be split at a ratio are not used there.
    """
    rng = np.random.default_rng(seed)
    usable = [text for text in texts if len(text) >= 2]
    samples = []
    for ratio in range(ratio_step, 100, ratio_step):
        for _ in range(per_ratio if usable else 0):
            text = usable[rng.integers(len(usable))]
            begin = int(rng.integers(0, max(1, len(text) - most_tokens + 1)))
            ids = tuple(text[begin : begin + most_tokens])
            prefix_len = min(len(ids) - 1, max(1, round(ratio / 100 * len(ids))))
            samples.append(Sample(ids, prefix_len, ratio))
    return samples


def draw_samples(
    model: Model,
    requests: Sequence[Request],
    *,
    split: bool,
    ratio_step: int = 5,
    per_ratio: int = 64,
    with_response: bool = False,
    most_tokens: int = 1024,
    seed: int = 0,
) -> list[Sample]:
    """Calibration sequences of requests, at the prefixes they have or split at every ratio.

    Args:
        model: whose keys and values will be compared.
        requests: where the tokens come from.
        split: take prompts as plain text (`synthetic_samples`), instead of their own prefixes (`samples_of_requests`).
        ratio_step: percent from one ratio to the next.
        per_ratio: most samples of a ratio.
        with_response: append the masked response, where prompts are not split.
        most_tokens: of a split text.
        seed: of the splits.
    """
    if split:
        return synthetic_samples(
            [request.prompt_ids for request in requests],
            ratio_step=ratio_step,
            per_ratio=per_ratio,
            seed=seed,
            most_tokens=min(most_tokens, model.config.max_length),
        )
    return samples_of_requests(
        requests,
        ratio_step=ratio_step,
        per_ratio=per_ratio,
        mask_id=model.config.mask_id,
        with_response=with_response,
    )


def refuse_exact(model: Model, name: str) -> None:
    """Says that a model has no boundary to measure.

    Args:
        model: the model.
        name: what messages call it.

    Raises:
        BicacheError: its attention is block-causal.
    """
    if model.config.block_causal:
        raise BicacheError(
            f"{name}: its attention is block-causal, so its caches are exact and there is no boundary to measure"
        )


def profile_model(
    model: Model,
    requests: Asked,
    *,
    split: bool = False,
    response: int = 0,
    ratio_step: int = 5,
    samples: int = 16,
    threshold: float = THRESHOLD,
    attention: str = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> BoundaryTable:
    """Makes the boundary table of a model, as `bicache profile` does.

    `CacheConfig(table=found.table)` uses it. Similarity is not accuracy: check a table against answers
    (`bicache_jax.measure.by_boundary`).

    Args:
        model: the model.
        requests: texts, conversations or dicts, as `Engine.generate` takes them; like what the model will be asked.
        split: take prompts as plain text, and split them at every ratio; False: measure at their own prefixes.
        response: masked response tokens behind each prompt, where prompts are not split. With as many as will be asked
            for, the table has the ratios that these requests will have; 0 is what is published.
        ratio_step: percent from one ratio to the next.
        samples: most samples of a ratio.
        threshold: similarity above which a layer is shallow.
        attention: implementation of attention (see `bicache_jax.kernels.prefix_attention`).
        progress: called with the number of samples that have been measured since.

    Raises:
        TypeError: something is not a request.
        BicacheError: the model's caches are exact, a request is faulty, or none has a prefix to measure.
    """
    refuse_exact(model, model.name)
    parser = Parser(model.config, model.tokenizer, SamplingConfig(gen_length=max(1, response)))
    asked = [entry for entry in admit(requests, parser, errors="raise") if isinstance(entry, Request)]
    drawn = draw_samples(
        model, asked, split=split, ratio_step=ratio_step, per_ratio=samples, with_response=response > 0
    )
    if not drawn:
        raise BicacheError("no request has a shared prefix to measure; give 'prefix_len', or split=True")
    measured = []
    for place, similarity in measure(model, drawn, attention=attention):
        measured.append((drawn[place].ratio, [float(value) for value in similarity]))
        progress(1)
    return make_table(model, measured, threshold=threshold)


def measure(model: Model, samples: Sequence[Sample], *, attention: str = "auto") -> Iterator[tuple[int, np.ndarray]]:
    """Measures samples; samples of the same shape are batched.

    Yields:
        (index of the sample, mean similarity of each layer [L]).
    """
    backbone = backbone_here(model.config, attention, devices=jax.devices()[:1], make=model.backbone)
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        shapes.setdefault((length_bucket(len(sample.ids)), length_bucket(sample.prefix_len)), []).append(index)
    for (length, prefix), members in sorted(shapes.items()):
        for begin in range(0, len(members), ROWS):
            part = members[begin : begin + ROWS]
            ids = np.zeros((ROWS, length), np.int32)
            sizes = np.ones((2, ROWS), np.int32)  # padding rows: length 1, prefix length 1
            for row, index in enumerate(part):
                sample = samples[index]
                ids[row, : len(sample.ids)] = sample.ids
                sizes[:, row] = len(sample.ids), sample.prefix_len
            found = layer_similarity(
                backbone,
                model.params,
                jnp.asarray(ids),
                jnp.asarray(sizes[0]),
                jnp.asarray(sizes[1]),
                prefix_bucket=min(prefix, length),
            )
            yield from zip(part, np.asarray(found), strict=False)


def shallow_layers(similarity: Sequence[float], threshold: float) -> int:
    """Number of leading layers with a similarity above the threshold."""
    below = [layer for layer, value in enumerate(similarity) if not value > threshold]
    return below[0] if below else len(similarity)


def make_table(
    model: Model, measured: Iterable[tuple[int, Sequence[float]]], *, threshold: float = THRESHOLD
) -> BoundaryTable:
    """A boundary table from measurements.

    Args:
        model: the model that was measured.
        measured: (ratio, similarity of each layer) for each sample.
        threshold: a layer with a similarity above it is shallow.

    Returns:
        The table. It is non-decreasing: a boundary chosen for one ratio also applies to higher ratios.
    """
    by_ratio: dict[int, list[Sequence[float]]] = {}
    for ratio, similarity in measured:
        by_ratio.setdefault(ratio, []).append(similarity)
    means: Mapping[int, tuple[float, ...]] = {
        ratio: tuple(float(value) for value in np.mean(by_ratio[ratio], axis=0)) for ratio in sorted(by_ratio)
    }
    chosen = np.maximum.accumulate([shallow_layers(values, threshold) for values in means.values()])
    return BoundaryTable(
        model=model.name,
        fingerprint=model.fingerprint,
        num_layers=model.config.num_layers,
        threshold=threshold,
        samples_per_ratio=min(map(len, by_ratio.values())),
        table={ratio: int(boundary) for ratio, boundary in zip(means, chosen, strict=True)},
        similarity=means,
    )
