"""The grammar of the command line."""

from __future__ import annotations

import argparse

from mmau import __version__
from mmau.cli import completion, components, doctor, evaluate, predict, prepare

EXIT_CODES = """\
exit codes:
  0    done
  1    the input or the installation is at fault; the last line says what
  2    wrong usage
  3    some files of a batch failed; the others are done, and the failures are listed
  130  interrupted; nothing half-written was left under a final name"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `mmau`."""
    parser = argparse.ArgumentParser(
        prog="mmau",
        description="Audio-visual Action Unit detection.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmau {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="no progress, no summary")
    common.add_argument(
        "--log-json", action="store_true", help="progress, notes and errors as JSON lines on stderr"
    )
    parser.set_defaults(parser=parser)  # for the command that completes all of them
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (prepare, predict, evaluate, components, doctor, completion):
        module.add_parser(commands, [common])
    return parser
