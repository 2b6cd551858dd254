"""What subcommands share on the command line: the parser, argument types, and configurations made from flags."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import bicache_jax
from bicache_jax.core.types import BicacheError

C = TypeVar("C")


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are one line, and whose flags have no abbreviations that a later flag breaks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses once more where a preset is named: its flags become the defaults, so that any flag precedes them."""
        first = super().parse_known_args(args, copy.copy(namespace))
        preset = getattr(first[0], "preset", None)
        if preset is None or not any(action.dest == "preset" for action in self._actions):
            return first
        known = {action.dest: action.default for action in self._actions}
        for group in self._mutually_exclusive_groups:  # a flag that was given rules out the others of its group
            if any(getattr(first[0], action.dest) != action.default for action in group._group_actions):
                known = {name: value for name, value in known.items() if name not in map(_dest, group._group_actions)}
        known = {name: known[name] for name in preset if name in known}
        self.set_defaults(**{name: preset[name] for name in known})
        try:
            return super().parse_known_args(args, namespace)
        finally:
            self.set_defaults(**known)  # the next line of arguments may name another preset

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage, which is a screen long."""
        raise BicacheError(f"{message} (see {self.prog} --help)")


def _dest(action: argparse.Action) -> str:
    return action.dest


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


def boundary(text: str) -> int | str:
    """The argument type of `--boundary`: `auto` or a number of layers."""
    if text == "auto":
        return text
    try:
        return integer(0)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be 'auto' or an integer >= 0, got {text!r}") from None


def from_flags(make: Callable[..., C], **fields: Any) -> C:
    """Makes a configuration and says its complaints in the words of the command line.

    Args:
        make: a configuration class that raises ValueError, naming fields.
        **fields: its fields, named like their flags.

    Raises:
        BicacheError: the values do not go together; fields are named as flags.
    """
    try:
        return make(**fields)
    except ValueError as error:
        message = str(error)
        for name in fields:
            # Only a leading "steps" is the flag; further on it is a word.
            pattern = rf"\b{name}\b" if "_" in name else rf"^{name}\b"
            message = re.sub(pattern, "--" + name.replace("_", "-"), message)
        raise BicacheError(message) from None


def warn(message: str) -> None:
    """Tells the user, on a line of standard error, what went otherwise than they may think."""
    print(f"bicache: warning: {' '.join(message.split())}", file=sys.stderr)


def version() -> str:
    """The installed release, or `unknown` in a checkout that was never installed."""
    return bicache_jax.__version__
