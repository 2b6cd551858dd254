"""What subcommands share on the command line: the parser, argument types, and configurations made from flags."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from bicache_jax.core.config import CACHE_DTYPES, QUANTIZE
from bicache_jax.core.types import BicacheError

C = TypeVar("C")


@runtime_checkable
class FlagGroup(Protocol):
    """What flags can be added to: a parser, or a group of one."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's."""
        ...

    def add_mutually_exclusive_group(self, *, required: bool = ...) -> Any:
        """As argparse's."""
        ...


class _NotGiven:
    """The value of a flag that a preset may set, until the whole line has been read."""


NOT_GIVEN = _NotGiven()


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are one line, and whose flags have no abbreviations that a later flag breaks.

    Attributes:
        presettable: flags, by the names of their values, that the flag `--preset` may set; its value maps some of them
            to values. Any flag that is given overrides the preset.
        exclusive: sets of such flags of which one rules out the others.
    """

    presettable: Collection[str] = ()
    exclusive: Collection[Collection[str]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and gives each flag that was not given the preset's value, or its default."""
        namespace = argparse.Namespace() if namespace is None else namespace
        names = [name for name in self.presettable if not hasattr(namespace, name)]
        for name in names:
            setattr(namespace, name, NOT_GIVEN)
        namespace, extra = super().parse_known_args(args, namespace)
        preset = getattr(namespace, "preset", None) or {}
        missing = {name for name in names if getattr(namespace, name) is NOT_GIVEN}
        ruled_out = {name for group in self.exclusive if not missing.issuperset(group) for name in group}
        for name in missing:
            from_preset = name in preset and name not in ruled_out
            setattr(namespace, name, preset[name] if from_preset else self.get_default(name))
        return namespace, extra

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage, which is a screen long."""
        raise BicacheError(f"{message} (see {self.prog} --help)")


DTYPE_HELP = (
    "auto: float32 on CPU, float16 on GPUs that have no bfloat16 (before compute capability 8), else bfloat16 (default:"
    " %(default)s)"
)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The argument type of integers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bound = f">= {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be an integer {bound}, got {text!r}")
        return value

    return parse


def listed(text: str) -> tuple[str, ...]:
    """The argument type of names with commas between them."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("must name at least one")
    return names


def listed_of(words: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The argument type of some of these words with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = listed(text)
        for name in names:
            if name not in words:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(words)}, got {name!r}")
        return names

    return parse


def integers(least: int, most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """The argument type of integers with commas between them."""
    one = integer(least, most)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(one(part) for part in listed(text))

    return parse


def fraction(text: str) -> float:
    """The argument type of numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def auto_or_integer(least: int) -> Callable[[str], int | str]:
    """The argument type of `auto` and integers from `least` on."""

    def parse(text: str) -> int | str:
        if text == "auto":
            return text
        try:
            return integer(least)(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"must be 'auto' or an integer >= {least}, got {text!r}") from None

    return parse


def row_count(text: str) -> int | str:
    """The argument type of `--rows`: `auto`, `max` or a number."""
    return text if text == "max" else auto_or_integer(1)(text)


def boundary(text: str) -> int | str:
    """The argument type of `--boundary`: `auto` or a number of layers."""
    return auto_or_integer(0)(text)


def add_checkpoint_flags(group: FlagGroup, *, formats: bool = False) -> None:
    """Adds the flags that say what a checkpoint's files do not: its mask token, how it was trained, its format here.

    Args:
        group: where they belong.
        formats: whether several formats are compared.
    """
    group.add_argument(
        "--mask-id", type=integer(0), metavar="ID", help="mask token (default: the checkpoint's or its tokenizer's)"
    )
    group.add_argument(
        "--block-causal",
        action="store_true",
        help="the checkpoint was trained with block-causal attention though its config does not say so: A2D models"
        " trained as BD3LM (default: what its family says)",
    )
    group.add_argument(
        "--right-shift-logits",
        action="store_true",
        help="position j is read from the logits of j - 1: A2D models trained so (default: what its family says)",
    )
    if formats:
        group.add_argument(
            "--quantize",
            type=listed,
            default=("none",),
            metavar="LIST",
            help="formats of weights to compare: none, w8, w8a8, as in generate (default: none)",
        )
    else:
        add_quantize_flag(group)
    add_weights_flag(group)


def add_quantize_flag(group: FlagGroup) -> None:
    """Adds the flag that names the format of weights."""
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="w8: weights in 8 bits, half the memory; w8a8: also what they are multiplied with, so that products are of"
        " integers (default: as they are stored)",
    )


def add_cache_dtype_flag(group: FlagGroup, *, several: bool = False) -> None:
    """Adds the flag that says how the keys and values of prefixes are kept.

    Args:
        group: where it belongs.
        several: whether several forms are compared.
    """
    if several:
        group.add_argument(
            "--cache-dtype",
            type=listed_of(CACHE_DTYPES),
            default=("auto",),
            metavar="LIST",
            help="forms of a prefix's keys and values to compare: auto, int8, as in generate (default: auto)",
        )
        return
    group.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="how keys and values of prefixes are kept. auto: in the model's dtype; int8: in 8 bits with a scale for"
        " each token and head, about half the memory of bfloat16 and approximate (default: %(default)s)",
    )


def add_weights_flag(group: FlagGroup) -> None:
    """Adds the flag that has weights looked at while they are loaded."""
    group.add_argument(
        "--check-weights",
        action="store_true",
        help="look for NaN and infinity in every tensor while the model is loaded, and name those tensors"
        " (default: off)",
    )


def refuse_flags(
    args: argparse.Namespace, names: Iterable[str], add_arguments: Callable[[Parser], None], why: str
) -> None:
    """Refuses flags that have no use here.

    Args:
        args: what was parsed.
        names: the flags' names.
        add_arguments: what adds the command's flags, and so knows their defaults.
        why: what is said of one that was given.

    Raises:
        BicacheError: one has another value than its default.
    """
    defaults = Parser()
    add_arguments(defaults)
    for name in names:
        if getattr(args, name) != defaults.get_default(name):
            raise BicacheError(f"--{name.replace('_', '-')} {why}")


def from_flags(make: Callable[..., C], **fields: Any) -> C:
    """Makes a configuration and says its complaints in the words of the command line.

    Args:
        make: a configuration class that raises ValueError, naming fields.
        **fields: its fields, named like their flags.

    Raises:
        BicacheError: the values do not go together; fields are named as flags.
    """
    with flags_named(*fields):
        return make(**fields)


@contextmanager
def flags_named(*names: str) -> Iterator[None]:
    """Says complaints that name fields in the words of the command line.

    Raises:
        BicacheError: a ValueError was raised inside, fields named as flags.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in names:
            # Only a leading "steps" is the flag; further on it is a word.
            pattern = rf"\b{name}\b" if "_" in name else rf"^{name}\b"
            message = re.sub(pattern, "--" + name.replace("_", "-"), message)
        raise BicacheError(message) from None


@contextmanager
def flag_named(name: str, flag: str | None = None) -> Iterator[None]:
    """Says complaints that begin with the name of an argument in the words of the command line.

    Args:
        name: the argument.
        flag: its flag, where that has another name.

    Raises:
        BicacheError: what was raised inside, the argument named as a flag.
    """
    try:
        yield
    except BicacheError as error:
        if not str(error).startswith(f"{name} "):
            raise
        raise BicacheError(f"{flag or '--' + name}{str(error)[len(name) :]}") from None


def warn(message: str) -> None:
    """Tells the user, on a line of standard error, what went otherwise than they may think."""
    print(f"bicache: warning: {' '.join(message.split())}", file=sys.stderr)
