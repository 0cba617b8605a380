"""The options of `predict` and `prepare` that say which faces are followed, and by what."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mmau.cli.console import UserError

if TYPE_CHECKING:
    from mmau.media.faces import FaceOptions


def add_face_options(parser: argparse.ArgumentParser, *, all_gives: str) -> None:
    """Add the options to a command."""
    parser.add_argument(
        "--face",
        choices=("largest", "left", "right", "all"),
        default="largest",
        help=f"who is followed; all gives {all_gives} (%(default)s)",
    )
    parser.add_argument("--detector", default="mediapipe", help="face detector (%(default)s)")
    parser.add_argument("--landmarks", default="mediapipe", help="landmark extractor (%(default)s)")
    for flag, component in (("detector", "detector"), ("landmarks", "landmark extractor")):
        parser.add_argument(
            f"--{flag}-option",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"option of the {component}, such as path=boxes.csv",
        )


def face_options(arguments: argparse.Namespace) -> FaceOptions:
    """Read the options; what is wrong for every video is said once, before the first one."""
    from mmau.media.faces import FaceOptions

    options = FaceOptions(
        arguments.detector,
        arguments.landmarks,
        arguments.face,
        _pairs("--detector-option", arguments.detector_option),
        _pairs("--landmarks-option", arguments.landmarks_option),
    )
    try:
        return options.check()
    except TypeError as error:  # an option that the component does not have
        raise UserError(str(error)) from error


def _pairs(flag: str, given: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"{flag} takes NAME=VALUE; got {text!r}.")
        try:
            pairs[name] = float(value) if "." in value else int(value)
        except ValueError:
            pairs[name] = value
    return pairs
