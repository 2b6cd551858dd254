"""`bicache lm-eval`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bicache_jax.cli import backend
from bicache_jax.cli.decoding import sampling_from_flags
from bicache_jax.cli.generate import add_running_arguments
from bicache_jax.cli.options import Parser, integer, listed
from bicache_jax.cli.running import cache_from_flags
from bicache_jax.cli.score import add_estimate_arguments, estimate_from_flags
from bicache_jax.core.types import BicacheError

if TYPE_CHECKING:
    from bicache_jax.harness.model import BicacheLM

MISSING = "lm-evaluation-harness is not installed: pip install 'bicache-jax[lm-eval]'"
JOURNAL = "lm-eval.journal"
ASKING = ("tasks", "num_fewshot", "limit", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")
"""What decides the harness's requests: a journal goes on with the same only."""
HELP = "run tasks of lm-evaluation-harness"
DESCRIPTION = """\
Runs tasks of lm-evaluation-harness (lm_eval 0.4.9 or newer), those that generate and those that compare likelihoods.
The few-shot examples that all items of a task begin with are their prefix, which is encoded once. Results are in the
harness's own format, with our settings and what the caches did under config.bicache.

Needs pip install 'bicache-jax[lm-eval]'. Tasks come from the Hugging Face hub unless their files are at hand
(--include-path). The harness's own command with this model is python -m bicache_jax.lm_eval."""
EPILOG = """\
exit status: 0 all is well, 2 bad flags, an unreadable file or a task that cannot run, 130 interrupted (what was
answered is kept in OUTPUT/lm-eval.journal; the same command with --resume continues).

examples:
  bicache lm-eval --model GSAI-ML/LLaDA-8B-Base --tasks mmlu,arc_challenge --num-fewshot 5 --output results
  bicache lm-eval --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k --apply-chat-template --gen-length 256 \\
      --block-length 32 --output results"""


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `lm-eval`."""
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", type=listed, required=True, metavar="LIST", help="tasks, groups or patterns (mmlu_*), with commas"
    )
    tasks.add_argument(
        "--num-fewshot", type=integer(0), metavar="K", help="examples in front of each item (default: the task's)"
    )
    tasks.add_argument("--limit", type=integer(1), metavar="N", help="items of a task, the first ones (default: all)")
    tasks.add_argument(
        "--include-path", metavar="DIR", help="folder of further tasks, YAML files (default: the harness's own)"
    )
    tasks.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the model's chat template (default: plain text)"
    )
    tasks.add_argument("--system-instruction", metavar="TEXT", help="system message of every item (default: none)")
    tasks.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with a chat template: examples are turns of the conversation, not part of one message (default: on)",
    )
    files = parser.add_argument_group("output")
    files.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the harness's results, in one named after the model (default: only the table is printed)",
    )
    files.add_argument("--log-samples", action="store_true", help="also write every request and answer (default: off)")
    files.add_argument("--json", action="store_true", help="print results as JSON instead of tables")
    again = files.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help=f"continue OUTPUT/{JOURNAL} after a run that was cut short"
    )
    again.add_argument("--overwrite", action="store_true", help=f"drop the {JOURNAL} of an earlier run")
    add_model_flags(parser)


def add_model_flags(parser: Parser, *, required: bool = True) -> None:
    """Adds the flags that say what answers and how, which are the arguments of the harness's model `bicache`."""
    add_estimate_arguments(parser)
    parser.add_argument_group("limits").add_argument(
        "--max-length",
        type=integer(2),
        metavar="N",
        help="most tokens of prompt and response; longer prompts lose their first ones (default: the model's)",
    )
    add_running_arguments(parser, required=required, gen_length=None)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache lm-eval`; returns the exit status."""
    _need_harness()
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable, make_table

    if args.resume and args.output is None:
        raise BicacheError("--resume reads the journal in the folder that --output names: give it")
    cache_from_flags(args), estimate_from_flags(args)  # bad flags cost no load
    manager = _tasks(args)
    journal = None
    if args.output is not None:
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BicacheError(f"--output {args.output}: cannot make the folder: {error.strerror}") from error
        journal = Path(args.output) / JOURNAL
    model = open_model(args, journal=journal, resume=args.resume, overwrite=args.overwrite)
    tracker = EvaluationTracker(output_path=args.output)
    done = False
    try:
        results: Any = simple_evaluate(
            model=model,
            model_args={"model": args.model},
            tasks=[task for name in args.tasks for task in manager.match_tasks([name])],
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            log_samples=args.log_samples,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.fewshot_as_multiturn and args.apply_chat_template,
            system_instruction=args.system_instruction,
            task_manager=manager,
            evaluation_tracker=tracker,
        )
        results["config"]["model"] = "bicache"
        samples = results.pop("samples", None)
        if args.output is not None:
            tracker.save_results_aggregated(results=results, samples=samples)
            for name, of_task in (samples or {}).items():
                tracker.save_results_samples(task_name=name, samples=of_task)
        done = args.output is None or any(Path(args.output).rglob(f"results_{tracker.date_id}.json"))
    finally:
        model.close(done=done)
    if not done:
        raise BicacheError(f"cannot write results into --output {args.output}: what was answered is in {journal}")
    if args.json:
        print(json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False))
    else:
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    if not args.quiet:
        print(_closing_line(results["config"]["bicache"]), file=sys.stderr)
    return 0


def _tasks(args: argparse.Namespace) -> Any:
    """What knows the tasks that are asked for.

    Raises:
        BicacheError: there is no such task, or no such folder; or, from what is returned, a task cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    def load(how: Callable[..., Any], names: Any) -> Any:
        try:
            return how(names)
        except Exception as error:  # files, functions in them, data sets, the hub: anything
            reason = next(iter(str(error).splitlines()), "")
            raise BicacheError(
                f"--tasks {','.join(args.tasks)}: cannot be loaded: {type(error).__name__}: {reason}"
            ) from error

    class Manager(TaskManager):
        """Says in a line what cannot be loaded; the second is what older releases call."""

        def load(self, task_list: Any) -> Any:
            return load(super().load, task_list)

        def load_task_or_group(self, task_list: Any = None) -> Any:
            return load(super().load_task_or_group, task_list)

    own = args.include_path
    if own is not None and not Path(own).is_dir():
        raise BicacheError(f"--include-path {own}: there is no such folder")
    # The harness's own tasks are thousands of files: they are read where one of them is meant.
    for defaults in (False, True) if own is not None else (True,):
        manager = Manager(include_path=own, include_defaults=defaults)
        unknown = [name for name in args.tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    yaml = importlib.import_module("yaml")  # the harness needs it; its types are in few environments
    for path in sorted(Path(own).rglob("*.yaml")) if own is not None else ():
        try:
            yaml.compose(path.read_bytes())
        except (OSError, yaml.YAMLError) as error:  # the harness goes past such a file
            raise BicacheError(f"--include-path: cannot read {path}: {error}") from error
    raise BicacheError(f"--tasks: there is no task {unknown[0]!r}; 'lm-eval ls tasks' lists them")


def open_model(
    args: argparse.Namespace, *, journal: Path | None = None, resume: bool = False, overwrite: bool = False
) -> BicacheLM:
    """Loads the model that the flags name, behind the harness's interface.

    Raises:
        BicacheError: the model cannot be read, flags do not go together, or the journal is another run's.
    """
    from bicache_jax.harness.asked import USUAL_LENGTH
    from bicache_jax.harness.model import BicacheLM

    cache, estimate = cache_from_flags(args), estimate_from_flags(args)
    sampling = sampling_from_flags(
        args, gen_length=args.gen_length or USUAL_LENGTH, seed=args.seed, early_stop=bool(args.early_stop)
    )
    session = backend.open_session(args, cache, sampling)
    return BicacheLM(
        session,
        name=args.model,
        estimate=estimate,
        gen_length=args.gen_length,
        max_length=args.max_length,
        journal=journal,
        run={name: getattr(args, name) for name in ASKING if hasattr(args, name)},
        resume=resume,
        overwrite=overwrite,
        quiet=args.quiet,
    )


def model_of(arguments: Mapping[str, Any]) -> BicacheLM:
    """The model from arguments by name; errors as `model_arguments` and `open_model`."""
    return open_model(model_arguments(arguments))


def model_arguments(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of a model from arguments by name, which are flags without their dashes.

    Raises:
        BicacheError: there is no such flag, or a value is bad.
    """
    parser = Parser(prog="--model_args")
    add_model_flags(parser)
    some_model = ["--model", "example"]
    known = vars(parser.parse_args(some_model))
    words = []
    for name, value in arguments.items():
        flag = "--" + ("model" if name == "pretrained" else name.replace("_", "-"))
        negated = f"--no-{flag[2:]}"
        if value is True or str(value).lower() == "true":
            words.append(flag)
        elif value is False or str(value).lower() == "false":
            _, unknown = parser.parse_known_args([*some_model, negated])
            is_flag = flag[2:].replace("-", "_") in known
            words += [negated] if not unknown else [] if is_flag else [flag]
        elif value is not None:
            words += [flag, str(value).replace(";", ",")]  # the harness parts arguments at commas: mesh=data=2;model=4
    found: argparse.Namespace = parser.parse_args(words)
    return found


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise BicacheError(MISSING) from error


def _closing_line(found: Mapping[str, Any]) -> str:
    stats = found["stats"]
    parts = [f"{stats['rows']} answers and {stats['scored']} texts scored in {stats['seconds']:.1f} s"]
    parts += [f"{found['resumed']} from the journal"] * bool(found["resumed"])
    parts.append(f"{stats['compile_seconds']:.1f} s of it compilation")
    parts.append(f"{stats['prefixes_encoded']} prefixes encoded, {stats['prefix_hits']} prefix hits")
    return f"bicache: {', '.join(parts)}; policy {found['policy']}"
