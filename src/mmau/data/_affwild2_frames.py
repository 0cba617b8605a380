"""Folders of cropped images, one image per frame number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmau.media._container import open_container
from mmau.media.errors import MediaError

__all__ = ["FilledFrames", "FrameFolder", "find_frame_folders", "frame_numbers"]

_FOLDER_PREFIX = "cropped_aligned"


class FilledFrames(NamedTuple):
    """What `FrameFolder.fill` returns: one row per frame number, whether there is an image."""

    images: npt.NDArray[np.uint8]
    """`(t, h, w, 3)`, RGB; row i is frame number i + 1, zeros where there is no image."""
    present: npt.NDArray[np.bool_]
    """`(t,)`, whether there is an image: the rows to use."""
    num_beyond: int
    """Images whose number is above `t`; they are left out."""


def frame_numbers(folder: str | Path) -> npt.NDArray[np.int64]:
    """List the frame numbers of a folder of cropped images, `00001.jpg` and so on.

    Args:
        folder: Folder of one trial; hidden files, sub-folders and other files are ignored.

    Returns:
        `(n)`, 1-based and increasing, with gaps where there is no image; empty without any image.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If two images have one number, or a number is 0.
    """
    return np.array(sorted(_images(Path(folder))), dtype=np.int64)


def find_frame_folders(root: str | Path) -> dict[str, Path]:
    """List the folders of cropped images of a data root, from all its parts.

    The images come in several archives, `cropped_aligned` and `cropped_aligned_new_50_vids`, that
    people unpack beside or inside each other: every folder whose name starts with
    `cropped_aligned`, in the root or one level below, is searched.

    Args:
        root: The data root.

    Returns:
        Trial name, with its suffix, to folder; sorted by name.

    Raises:
        FileNotFoundError: If there is no such root.
        ValueError: If two parts hold a folder of one name.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    parts = [
        part
        for pattern in (f"{_FOLDER_PREFIX}*", f"*/{_FOLDER_PREFIX}*")
        for part in root.glob(pattern)
        if part.is_dir() and not part.parent.name.startswith((".", "__MACOSX"))
    ]
    found: dict[str, Path] = {}
    for part in sorted(parts):
        for folder in sorted(part.iterdir()):
            if not folder.is_dir() or folder.name.startswith((".", _FOLDER_PREFIX)):
                continue
            if folder.name in found:
                raise ValueError(
                    f"two folders hold the images of one trial: {found[folder.name]} and {folder}."
                )
            found[folder.name] = folder
    return dict(sorted(found.items()))


class FrameFolder:
    """The cropped images of one trial, read by frame number and never by position.

    A number without an image stays without one: gaps at the start, in the middle and at the end are
    the rule in Aff-Wild2. There is no clock in a folder; the time of frame number i is that of the
    i-th decoded frame of the video.

    Args:
        path: Folder of `00001.jpg` and so on; hidden files, sub-folders and others are ignored.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If two images have one number, or a number is 0.

    Examples:
        Labels and images of one trial, joined by number.

        ```python
        folder = FrameFolder("cropped_aligned/video10_1_left")
        joined = join_labels(read_annotation(path).select(), folder.numbers)
        for (number, image), row in zip(folder, joined.labels):
            print(number, image.shape, row)
        ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = dict(sorted(_images(self.path).items()))
        self.numbers: npt.NDArray[np.int64] = np.array(list(self._files), dtype=np.int64)
        """`(n)`, 1-based and increasing: the frames that have an image."""

    def __repr__(self) -> str:
        return f"FrameFolder({str(self.path)!r}, {len(self)} images)"

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        for number in self._files:
            yield number, self.read(number)

    def read(self, number: int) -> npt.NDArray[np.uint8]:
        """Read the image of one frame.

        Args:
            number: Frame number, counted from 1.

        Returns:
            `(h, w, 3)`, RGB.

        Raises:
            LookupError: If the frame has no image.
            MediaError: If the file is no image, or damaged.
        """
        if number not in self._files:
            raise LookupError(f"frame {number} has no image in {self.path}.")
        file = self._files[number]
        with open_container(file) as container:
            try:
                frame = next(container.decode(video=0), None)
            except ValueError as error:  # FFmpeg's invalid data is one
                raise MediaError(f"the image cannot be decoded: {file}") from error
        if frame is None:
            raise MediaError(f"the image cannot be decoded: {file}")
        image: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        return image

    def fill(self, num_frames: int) -> FilledFrames:
        """Read all images into one array, each at the place of its number.

        Args:
            num_frames: Rows `t`: of the annotation, or frames of the video.

        Returns:
            Images, where there is one, and how many were beyond the end.

        Raises:
            ValueError: If `num_frames` is negative, there is no image at all, or two images differ
                in size.
            MediaError: If a file is no image, or damaged.
        """
        if num_frames < 0:
            raise ValueError(f"`num_frames` must not be negative; got {num_frames}.")
        if not self._files:
            raise ValueError(f"there is not one image, so their size is not known: {self.path}")
        images: npt.NDArray[np.uint8] | None = None
        present = np.zeros(num_frames, dtype=np.bool_)
        for number in self._files:
            if images is not None and number > num_frames:
                break
            image = self.read(number)
            if images is None:
                images = np.zeros((num_frames, *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"the images of a trial must have one size, {images.shape[1:3]}; frame "
                    f"{number} has {image.shape[:2]}: {self._files[number]}"
                )
            if number <= num_frames:
                images[number - 1] = image
                present[number - 1] = True
        assert images is not None  # there is at least one file
        return FilledFrames(images, present, int((self.numbers > num_frames).sum()))


def _images(folder: Path) -> dict[int, Path]:
    """Frame number to file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\d+)\.(?:jpg|jpeg|png)", path.name)
        if match is None or not path.is_file():
            continue
        number = int(match[1])
        if number < 1:
            raise ValueError(f"frame numbers start at 1, so this is not one: {path}")
        if number in found:
            raise ValueError(f"two images of frame {number}: {found[number]} and {path}.")
        found[number] = path
    return found
