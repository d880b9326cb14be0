"""Plan a run before it is started: memory of a GPU, seconds of a step, judge servers, days and GPU-hours.

    python tools/plan.py --model-preset llama-1.4b --vocab-size 32000 --gpus 64 --pool rollout
    python tools/plan.py --model-preset llama3-8b --gpus 512 --tensor-model-parallel-size 8 --sequence-parallel \\
        --global-batch-size 4096 --token-budget 1e12 --judge-reading logit --levers
    python tools/plan.py --check step.json --fit-on other.json

The flags of the method are the trainer's. Everything that is assumed is a flag too and is printed with its source.
--check compares what is predicted with what tools/bench/step.py measured on this kind of machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.config.fields import flag_of
from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.numbers import whole_number
from megatron_sip.config.presets import presets
from megatron_sip.cost import check_report, report
from megatron_sip.cost.check import check, fit, planned
from megatron_sip.cost.hardware import Cluster, Efficiency
from megatron_sip.cost.judging import JudgeQuestions, JudgeServers
from megatron_sip.cost.levers import levers
from megatron_sip.cost.measured import read_measured
from megatron_sip.cost.plan import Case, make_plan
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes, model_sizes
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.evaluation.judge_report import write_file
from megatron_sip.evaluation.report import Grid, markdown_page, print_grids

Group = TypeVar("Group")
GROUPS: tuple[tuple[str, type[Any]], ...] = (
    ("run", RunSettings),
    ("trainer's machines", Cluster),
    ("what is reached of them", Efficiency),
    ("what is judged", JudgeQuestions),
    ("judge servers", JudgeServers),
)
MODEL_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)
UNTIED = "untie_embeddings_and_output_weights"
WIDTH_OF_A_FILE = 160


@dataclass(frozen=True)
class Result:
    """What is printed and written."""

    title: str
    tables: Sequence[Grid]
    lines: Sequence[str]
    data: dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The flags: of the tool, of the model, and those of every field of the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", action="store_true", help="also print what each changed setting would save")
    parser.add_argument("--check", nargs="+", type=Path, help="no plan: compare with files of tools/bench/step.py")
    parser.add_argument("--fit-on", nargs="+", type=Path, default=[], help="with --check: fit the machine's constants")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--report", type=Path, help="also write the tables here, as Markdown")
    model = parser.add_argument_group("model")
    model.add_argument("--model-preset", choices=list(presets()), help="sizes by name; given ones win")
    model.add_argument("--load", type=Path, help="take the sizes of this Hugging Face Llama folder")
    for name in MODEL_FLAGS:
        model.add_argument(flag_of(name), type=whole_number(1), help="as in the trainer")
    model.add_argument(flag_of(UNTIED), action=argparse.BooleanOptionalAction, default=None)
    for title, kind in GROUPS:
        _add_fields(parser.add_argument_group(title), kind)
    return parser


def _add_fields(group: Any, kind: type[Any]) -> None:
    """A flag for each field, of its type and with its default."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        hint, default = hints[item.name], item.default
        # argparse reads a percent sign in help as the start of a name.
        meaning = item.metadata["meaning"].replace("%", "%%")
        text = f"{meaning} (default %(default)s)" if default is not None else meaning
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if hint is bool:
            group.add_argument(flag_of(item.name), action=argparse.BooleanOptionalAction, default=default, help=text)
        elif typing.get_origin(hint) is typing.Literal:
            group.add_argument(flag_of(item.name), choices=typing.get_args(hint), default=default, help=text)
        elif typing.get_origin(hint) is tuple:
            choices = ("original", "rewrite", "rollout")
            group.add_argument(flag_of(item.name), nargs="+", choices=choices, default=default, help=meaning)
        else:
            group.add_argument(flag_of(item.name), type=hint, default=default, help=text)


def _group_of(kind: type[Group], args: argparse.Namespace) -> Group:
    """The dataclass with the values of its flags."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def sizes_of(args: argparse.Namespace) -> ModelSizes:
    """The model of the flags: a folder's, else given sizes over a preset's. SipError where one is missing."""
    values: dict[str, Any] = {name: getattr(args, name) for name in (*MODEL_FLAGS, UNTIED)}
    if args.load is not None:
        given = [flag_of(name) for name, value in values.items() if value is not None]
        if given or args.model_preset:
            raise ConfigError(f"--load has sizes of its own; leave out {', '.join(given or ['--model-preset'])}")
        return model_sizes(model_config_from_hf(args.load))
    values |= {"max_position_embeddings": 0, "rotary_base": 0.0, "norm_epsilon": 0.0}  # of no account here
    return model_sizes(ModelConfig(model_preset=args.model_preset, **values))


def case_of(args: argparse.Namespace) -> Case:
    """All that the plan is made from."""
    run, cluster, efficiency, questions, servers = (_group_of(kind, args) for _, kind in GROUPS)
    return Case(sizes_of(args), run, cluster, efficiency, questions, servers)


def plan(args: argparse.Namespace) -> Result:
    """A plan of the flags."""
    made = make_plan(case_of(args))
    changed = list(levers(made)) if args.levers else []
    return Result("Plan", report.grids(made, changed), report.remarks(made), report.as_json(made, changed))


def checked(args: argparse.Namespace) -> Result:
    """The cost model against measured steps."""
    basis = [step for path in args.fit_on for step in read_measured(path)]
    steps = [step for path in args.check for step in read_measured(path)]
    constants = fit(basis) if basis else None
    predict = planned(_group_of(Cluster, args), _group_of(Efficiency, args)) if constants is None else constants.seconds
    found = check([*steps, *(step for step in basis if step not in steps)], predict, basis)
    how = "constants fitted on the sizes with a star" if basis else "the shares that the flags give"
    return Result(
        "Check of the cost model",
        check_report.grids(found, constants),
        [f"Predicted with {how}, from the measured rate of matrix products (GPU without a fit: --peak-tflops)."],
        check_report.as_json(found, constants),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 2 for bad input, with one line that says what is wrong."""
    args = build_parser().parse_args(argv)
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH_OF_A_FILE)
    try:
        if args.fit_on and not args.check:
            raise ConfigError("--fit-on belongs to --check; name the files to check with that")
        result = checked(args) if args.check else plan(args)
        print_grids(result.tables, result.lines, console)
        if args.json is not None:
            write_file(args.json, json.dumps(result.data, indent=1, allow_nan=False) + "\n", "--json")
        if args.report is not None:
            write_file(args.report, markdown_page(result.title, result.tables, result.lines), "--report")
    except SipError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
