"""`mmau completion`: scripts by which a shell completes the commands and options."""

from __future__ import annotations

import argparse
from typing import Any

from mmau._optional import require
from mmau.cli.console import Console

SHELLS = ("bash", "zsh", "tcsh", "fish")


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    del parents
    parser = commands.add_parser(
        "completion",
        help="print a script for shell completion",
        description="Print a script by which the shell completes commands and options.",
        epilog='bash: eval "$(mmau completion bash)"; zsh: the same with zsh; '
        "fish: mmau completion fish | source",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    parser.set_defaults(run=_run, quiet=False, log_json=False)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    console.result(completion_script(arguments.parser, arguments.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the script of a shell from the parser itself, so that it cannot be out of date."""
    shtab = require("shtab", purpose="shell completion", extra="cli")
    (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in group.choices.values():
        for action in command._actions:
            if action.nargs != 0 and action.choices is None and action.type is None:
                action.complete = shtab.FILE
    return str(shtab.complete(parser, shell)).strip()
