"""lm-evaluation-harness with the model `bicache`: its command line, and its registry.

`python -m bicache_jax.lm_eval run --model bicache --model_args model=example,policy=none --tasks ...` is the harness's
own command. It finds no models in installed packages by itself, so this module registers ours before that runs. In
Python, `import bicache_jax.lm_eval` does the same for `lm_eval.simple_evaluate(model="bicache", model_args=...)`.
Arguments of the model are the flags of `bicache lm-eval`, without dashes.
"""

from __future__ import annotations

import sys
from typing import Any

from bicache_jax.cli.lm_eval import MISSING, model_of

try:
    from lm_eval.api.registry import register_model
except ImportError as error:
    if __name__ == "__main__":
        print(f"bicache: error: {MISSING}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(MISSING) from error

from bicache_jax.harness.model import BicacheLM  # it imports the harness


@register_model("bicache")
class Registered(BicacheLM):
    """The model as the harness makes it, from arguments in words."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """Makes it from arguments by name.

        Args:
            arg_dict: flags of `bicache lm-eval`; `pretrained` is another name of `model`.
            additional_config: the harness's own `batch_size`, `max_batch_size` and `device`. Batches are planned unless
                `batch_size` is above 1, the harness's default.

        Raises:
            BicacheError: there is no such argument, or a value is bad.
        """
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        batch_size = str(more.get("batch_size"))
        planned = not batch_size.isdigit() or int(batch_size) <= 1
        return model_of({**({} if planned else {"batch_size": batch_size}), **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Makes it from `name=value,name=value`; errors as `create_from_arg_obj`."""
        pairs = [pair.partition("=") for pair in arg_string.split(",") if pair]
        return cls.create_from_arg_obj({name: value for name, _, value in pairs}, additional_config)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from bicache_jax.cli import leave_process, say_faults

    def command() -> int:
        """Runs the harness."""
        cli_evaluate()
        return 0

    leave_process(lambda: say_faults(command))
