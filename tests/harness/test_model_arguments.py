"""Arguments of the harness's model, which are flags without dashes; nothing here needs the harness."""

from __future__ import annotations

import pytest

from bicache_jax import BicacheError
from bicache_jax.cli.lm_eval import model_arguments


@pytest.mark.parametrize("value", ["False", "false", False])
def test_what_is_off_is_off(value) -> None:
    arguments = {"model": "example"}
    assert model_arguments(arguments).early_stop is None
    assert model_arguments({**arguments, "early_stop": value}).early_stop is False
    assert model_arguments({**arguments, "early_stop": not value or "true"}).early_stop is True
    assert model_arguments({**arguments, "check_weights": value}).check_weights is False
    with pytest.raises(BicacheError, match="--erly-stop"):
        model_arguments({**arguments, "erly_stop": value})
