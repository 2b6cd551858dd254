"""The checker behind jaxtyping's import hook: beartype with the numeric tower of PEP 484, where an int is a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
