"""`mmau completion`: scripts by which a shell completes the commands and options."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from mmau.cli.console import Console

SHELLS = ("bash", "zsh", "fish")


class _Option(NamedTuple):
    """One option of a command."""

    flags: tuple[str, ...]
    summary: str
    choices: tuple[str, ...]
    takes_value: bool


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
    from mmau.cli.parser import build_parser

    console.result(completion_script(build_parser(), arguments.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the script of a shell from the parser itself, so that it cannot be out of date.

    Examples:
        >>> parser = argparse.ArgumentParser(prog="mmau")
        >>> commands = parser.add_subparsers()
        >>> _ = commands.add_parser("predict", help="predict").add_argument("--plot", help="draw")
        >>> print(completion_script(parser, "fish").splitlines()[-1])
        complete -c mmau -n '__fish_seen_subcommand_from predict' -l plot -r -F -d 'draw'
    """
    commands = _commands(parser)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[_Option]]]:
    """Command to its summary and options."""
    (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in group._choices_actions}
    return {
        name: (
            summaries.get(name, ""),
            [
                _Option(
                    tuple(action.option_strings),
                    (action.help or "").split(" (%(")[0].replace("%%", "%"),
                    tuple(str(choice) for choice in action.choices or ()),
                    action.nargs != 0,
                )
                for action in command._actions
                if action.option_strings or action.choices
            ],
        )
        for name, command in group.choices.items()
    }


def _bash(commands: dict[str, tuple[str, list[_Option]]]) -> str:
    lines = [
        "_mmau() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))',
        "    return",
        "  fi",
        '  case "${COMP_WORDS[1]}:$before" in',
    ]
    for name, (_, options) in commands.items():
        for option in options:
            if option.choices:
                keys = " | ".join(f"{name}:{flag}" for flag in option.flags or (name,))
                lines.append(f'    {keys}) words="{" ".join(option.choices)}" ;;')
    lines += [
        "  esac",
        '  if [ -z "$words" ]; then',
        '    [ "${word:0:1}" = "-" ] || return  # file names: what the shell does by default',
        '    case "${COMP_WORDS[1]}" in',
    ]
    for name, (_, options) in commands.items():
        flags = " ".join(flag for option in options for flag in option.flags)
        lines.append(f'      {name}) words="{flags}" ;;')
    return "\n".join(
        [
            *lines,
            "    esac",
            "  fi",
            '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
            "}",
            "complete -o default -F _mmau mmau",
        ]
    )


def _zsh(commands: dict[str, tuple[str, list[_Option]]]) -> str:
    lines = ["#compdef mmau", "_mmau() {", "  local -a commands=("]
    lines += [f"    {_quoted(f'{name}:{summary}')}" for name, (summary, _) in commands.items()]
    lines += [
        "  )",
        "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
        "  local command=$words[2]; shift words; (( CURRENT-- ))",
        "  case $command in",
    ]
    for name, (_, options) in commands.items():
        specs = []
        for option in options:
            summary = option.summary.replace("[", "(").replace("]", ")").replace(":", ";")
            words = f"({' '.join(option.choices)})" if option.choices else "_files"
            value = f":{summary if option.choices else 'value'}:{words}"
            if not option.flags:
                specs.append(_quoted(f"1{value}"))
            for flag in option.flags:
                specs.append(_quoted(f"*{flag}[{summary}]{value if option.takes_value else ''}"))
        if not any(not option.flags for option in options):
            specs.append(_quoted("*:file:_files"))
        lines.append(f"    {name}) _arguments {' '.join(specs)} ;;")
    return "\n".join([*lines, "  esac", "}", "compdef _mmau mmau"])


def _fish(commands: dict[str, tuple[str, list[_Option]]]) -> str:
    lines = []
    for name, (summary, _) in commands.items():
        lines.append(
            f"complete -c mmau -n __fish_use_subcommand -f -a {name} -d {_quoted(summary)}"
        )
    for name, (_, options) in commands.items():
        where = f"complete -c mmau -n '__fish_seen_subcommand_from {name}'"
        for option in options:
            words = [where]
            for flag in option.flags:
                words.append(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}")
            if option.choices:
                words.append(f"-x -a {_quoted(' '.join(option.choices))}")
            elif option.takes_value:
                words.append("-r -F")
            lines.append(" ".join([*words, f"-d {_quoted(option.summary)}"]))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"
