"""The command `mmau`: prepare videos, predict Action Units, evaluate, look at the installation."""

from __future__ import annotations

from collections.abc import Sequence

from mmau.cli.components import all_registries
from mmau.cli.console import Console, UserError
from mmau.cli.parser import build_parser
from mmau.registry import MissingDependencyError, UnknownComponentError

__all__ = ["all_registries", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words after `mmau`; those of the process if left out.

    Returns:
        0 if done, 1 if the input or the installation is at fault, 3 if some files of a batch
        failed, 130 if interrupted. Wrong usage exits with 2.
    """
    arguments = build_parser().parse_args(argv)
    console = Console(quiet=arguments.quiet, json_lines=arguments.log_json)
    try:
        return int(arguments.run(arguments, console))
    except (
        UserError,
        MissingDependencyError,
        UnknownComponentError,
        OSError,
        ValueError,
    ) as error:
        # Their message is for the user; anything else is a bug and keeps its traceback.
        console.error(str(error))
        return 1
    except KeyboardInterrupt:
        console.error("interrupted; nothing half-written was left under a final name")
        return 130
