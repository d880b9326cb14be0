"""`python -m megatron_sip.recipes NAME [KEY=VALUE ...]`: a recipe as YAML, or as flags for a script."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from megatron_sip.config.fields import nearest
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import save_run_config, to_flags, to_yaml
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.recipes.llama import Goal, llama_1b4_from_scratch, llama_tiny_smoke, recipe_of_preset, recipes
from megatron_sip.recipes.overrides import apply_overrides

_WITHOUT_GOAL = (llama_1b4_from_scratch, llama_tiny_smoke)


def build(name: str, overrides: Sequence[str] = (), goal: Goal | None = None) -> Config:
    """The recipe called `name`, or the one for the model preset of that name, with overrides.

    Raises:
        ConfigError: an unknown recipe (the nearest is named), a goal that it has not, or a wrong override.
    """
    known = recipes() | recipe_of_preset()
    if name not in known:
        guess = nearest(name, known)
        hint = f"did you mean {guess}? " if guess else ""
        raise ConfigError(f"unknown recipe {name}; {hint}there are {', '.join(known)}")
    function = known[name]
    if goal is None:
        return apply_overrides(function(), overrides)
    if function in _WITHOUT_GOAL:
        raise ConfigError(f"recipe {name} has no --goal; its judges are fixed, change their weights by KEY=VALUE")
    return apply_overrides(function(goal), overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sip.recipes", description="Print a recipe.")
    parser.add_argument("name", metavar="NAME", help=", ".join(recipes() | recipe_of_preset()))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings on top of the recipe")
    parser.add_argument("--goal", choices=typing.get_args(Goal), help="what the judges look for (default: quality)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--yaml", metavar="FILE", type=Path, help="write the YAML here instead of printing it")
    output.add_argument("--print-flags", action="store_true", help="print flags, one argument a line, for mapfile -t")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = build(arguments.name, arguments.overrides, arguments.goal)
        if arguments.print_flags:
            print("\n".join(to_flags(config)))
        elif arguments.yaml:
            save_run_config(config, arguments.yaml)
        else:
            print(to_yaml(config), end="")
    except SipError as error:
        print(f"megatron_sip.recipes: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"megatron_sip.recipes: error: --yaml {arguments.yaml}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
