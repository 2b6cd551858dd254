"""Flags of decoding, the same for every command that generates."""

from __future__ import annotations

import argparse
from typing import Any

from bicache_jax.cli.options import FlagGroup, fraction, from_flags, integer, integers
from bicache_jax.core.config import REMASKING, SamplingConfig


def add_step_flags(group: FlagGroup) -> None:
    """Adds the flags that say how many steps there are, of which one rules out the other."""
    steps = group.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=integer(1), metavar="N", help="denoising steps (default: gen-length)")
    steps.add_argument(
        "--steps-per-block", type=integer(1), metavar="K", help="denoising steps of each block (default: from --steps)"
    )


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which tokens are chosen, and which of them first."""
    order = parser.add_argument_group("order", "which tokens are unmasked first, and how many at once")
    order.add_argument(
        "--remasking",
        choices=REMASKING,
        help="which tokens are unmasked first: the most probable (low_confidence, also called maskgit_plus), those that"
        " lead the runner-up most, those of lowest entropy, or any; origin: each with its own probability; sequential:"
        " from left to right (default: the family's, entropy for Dream, else low_confidence)",
    )
    order.add_argument(
        "--alg-temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw that order, with odds exp(confidence / T); 0: by rank (default: %(default)s)",
    )
    parallel = order.add_mutually_exclusive_group()
    parallel.add_argument(
        "--threshold",
        type=fraction,
        metavar="P",
        help="unmask every token of at least this probability at once, and steps mean nothing; where attention is"
        " block-causal, every token above it if they are as many as the schedule says, else that many (default: by"
        " schedule)",
    )
    parallel.add_argument(
        "--factor",
        type=float,
        metavar="F",
        help="likewise, the n most probable tokens for the largest n with (n + 1) * (1 - p_n) <= F (default: by"
        " schedule)",
    )
    parallel.add_argument(
        "--entropy-bound",
        type=float,
        metavar="NATS",
        help="likewise, tokens by ascending entropy while their entropies add up to less than NATS (default: by"
        " schedule)",
    )
    order.add_argument(
        "--editing-threshold",
        type=fraction,
        metavar="P",
        help="replace a token of the current block where the model now prefers another one with a probability above P,"
        " until a pass replaces none: LLaDA2.1 (default: what is placed stays)",
    )

    tokens = parser.add_argument_group("tokens", "what is written")
    tokens.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw tokens from the softmax at this temperature; 0: the most likely ones (default: %(default)s)",
    )
    tokens.add_argument(
        "--top-p",
        type=fraction,
        metavar="P",
        help="only from the most likely tokens that hold this share of the probability (default: all)",
    )
    tokens.add_argument(
        "--top-k", type=integer(1), metavar="K", help="only from the K most likely tokens (default: all)"
    )
    tokens.add_argument(
        "--cfg-scale",
        type=float,
        default=0.0,
        metavar="W",
        help="classifier-free guidance: logits u + (W + 1) * (c - u), with u those behind a prompt of masks; a pass"
        " then costs two, and the masks are cached as the prefix is; 0: no guidance (default: %(default)s)",
    )
    tokens.add_argument(
        "--suppress-tokens",
        type=integers(0),
        metavar="ID,ID",
        help="tokens that are never written (default: none)",
    )
    tokens.add_argument(
        "--logits-eos-inf", action="store_true", help="never write an end of text (LLaDA's option; default: off)"
    )
    tokens.add_argument(
        "--confidence-eos-eot-inf",
        action="store_true",
        help="unmask ends of text and of turn after all others (LLaDA's option; default: off)",
    )


def sampling_from_flags(args: argparse.Namespace, *, gen_length: int, seed: int, **more: Any) -> SamplingConfig:
    """Decoding settings from the flags.

    Args:
        args: the flags, `steps` and `block_length` among them.
        gen_length: response tokens.
        seed: seed of the noise.
        **more: further fields.

    Raises:
        BicacheError: the values do not go together; fields are named as flags.
    """
    return from_flags(
        SamplingConfig,
        gen_length=gen_length,
        steps=args.steps,
        steps_per_block=args.steps_per_block,
        block_length=args.block_length,
        remasking=args.remasking,
        alg_temperature=args.alg_temperature,
        threshold=args.threshold,
        factor=args.factor,
        entropy_bound=args.entropy_bound,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        cfg_scale=args.cfg_scale,
        suppress_tokens=args.suppress_tokens or (),
        editing_threshold=args.editing_threshold,
        logits_eos_inf=args.logits_eos_inf,
        confidence_eos_eot_inf=args.confidence_eos_eot_inf,
        seed=seed,
        **more,
    )
