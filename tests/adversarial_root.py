"""A small data root that contains every trap of Aff-Wild2, together with the truth about it.

Nothing here looks like a face: every image carries its video or trial and its frame number in its
pixels, and every row of labels its frame number in its bits. So a test can tell whether the frame,
the label and the time that were joined belong together, and which was taken instead if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from mmau.action_units import AU_NAMES

_CELLS = 8
_BITS = 16
_DARK, _BRIGHT = 24, 232
_SAMPLE_RATE = 16_000
_BLOCK = 1024


def draw_code(code: int, number: int, size: int) -> npt.NDArray[np.uint8]:
    """Draw two numbers of 16 bits as a chequered image that survives lossy compression."""
    word = (code << _BITS) | number
    bits = [(word >> place) & 1 for place in range(2 * _BITS)]
    # The second half is the complement of the first, so that a mistaken cell is noticed.
    cells = np.array([*bits, *(1 - bit for bit in bits)], dtype=np.uint8)
    levels = np.where(cells.reshape(_CELLS, _CELLS) == 1, _BRIGHT, _DARK).astype(np.uint8)
    image = np.kron(levels, np.ones((size // _CELLS, size // _CELLS), dtype=np.uint8))
    return np.repeat(image[..., None], 3, axis=-1)


def read_code(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Read the code and the frame number that `draw_code` drew; `ValueError` if there is none."""
    height, width = (side // _CELLS for side in image.shape[:2])
    cells = image[: height * _CELLS, : width * _CELLS].astype(np.float64)
    bright = cells.reshape(_CELLS, height, _CELLS, width, -1).mean(axis=(1, 3, 4)).flatten() > 128
    half = 2 * _BITS
    if (bright[:half] == bright[half:]).any():
        raise ValueError("the image carries no code, or is damaged.")
    word = sum(1 << place for place in range(half) if bright[place])
    return word >> _BITS, word & ((1 << _BITS) - 1)


def write_coded_image(path: Path, code: int, number: int, *, size: int) -> None:
    """Write one JPEG whose pixels tell a trial and a frame number."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width = encoder.height = size
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    image = av.VideoFrame.from_ndarray(draw_code(code, number, size), format="rgb24")
    image = image.reformat(format="yuvj420p")
    image.pts = 0
    packets = [*encoder.encode(image), *encoder.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def write_coded_video(
    path: Path,
    code: int,
    milliseconds: Sequence[int],
    *,
    size: int,
    average_rate: int,
    sound: tuple[float, float] | None,
) -> None:
    """Write a video whose frame i says i + 1, as MPEG-4 in AVI or as H.264 in MP4.

    AVI knows constant rates only: there, frame i is shown at `i / average_rate`. `sound` is its
    start and length in seconds.
    """
    is_avi = path.suffix.lower() == ".avi"
    with av.open(str(path), "w", format="avi" if is_avi else "mp4") as container:
        video = container.add_stream("mpeg4" if is_avi else "libx264", rate=average_rate)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.bit_rate = 2_000_000
        clock = Fraction(1, average_rate) if is_avi else Fraction(1, 1000)
        if not is_avi:
            # Frames that are stored in another order than they are shown.
            video.options = {"preset": "ultrafast", "x264-params": "threads=1:bframes=2"}
            video.codec_context.time_base = clock
        track = None
        if sound is not None:
            track = container.add_stream("pcm_s16le" if is_avi else "aac", rate=_SAMPLE_RATE)
            track.layout = "mono"
        for index, moment in enumerate(milliseconds):
            image = av.VideoFrame.from_ndarray(draw_code(code, index + 1, size), format="rgb24")
            image.pts, image.time_base = index if is_avi else moment, clock
            container.mux(video.encode(image))
        container.mux(video.encode())
        if track is not None and sound is not None:
            _write_sound(container, track, *sound)


def _write_sound(container: Any, track: Any, start: float, seconds: float) -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(-3000, 3000, (1, round(seconds * _SAMPLE_RATE)), dtype=np.int16)
    resampler = av.AudioResampler(format=track.format.name, layout="mono", rate=_SAMPLE_RATE)
    for begin in range(0, samples.shape[1], _BLOCK):
        block = np.ascontiguousarray(samples[:, begin : begin + _BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
        frame.sample_rate, frame.time_base = _SAMPLE_RATE, Fraction(1, _SAMPLE_RATE)
        frame.pts = round(start * _SAMPLE_RATE) + begin
        for ready in resampler.resample(frame):
            container.mux(track.encode(ready))
    container.mux(track.encode())


LEGACY_AU_NAMES = ("AU1", "AU2", "AU4", "AU6", "AU12", "AU15", "AU20", "AU25")
"""The header of the older annotations; AU20 was dropped later, five were added."""

_IMAGE_SIZE, _VIDEO_SIZE = 112, 64
_FIRST_PART, _SECOND_PART = "cropped_aligned", "cropped_aligned_new_50_vids"
_SPLIT_FOLDERS = {"train": "Train_Set", "validation": "Validation_Set"}


@dataclass(frozen=True)
class _Video:
    """How a video is made. `rate` is its true rate, whatever its name says."""

    name: str
    suffix: str
    num_frames: int
    rate: int
    sound: tuple[float, float] | None = (0.0, 1.0)
    """Start in seconds, and length as a share of the video."""
    variable: bool = False
    folder: str = "."

    @property
    def milliseconds(self) -> list[int]:
        if not self.variable:
            return [round(1000 * i / self.rate) for i in range(self.num_frames)]
        gaps = [(17, 33, 50, 120)[i % 4] for i in range(self.num_frames)]
        return [sum(gaps[:i]) for i in range(self.num_frames)]

    @property
    def timestamps(self) -> npt.NDArray[np.float64]:
        if self.suffix.lower() == ".avi":
            return np.arange(self.num_frames) / self.rate
        return np.array(self.milliseconds) / 1000


_VIDEOS = (
    _Video("video1", ".mp4", 24, 25),
    _Video("2-30-640x360", ".avi", 20, 12),  # 12 per second, not 30
    _Video("video10_1", ".mp4", 22, 20, sound=(0.0, 0.5)),
    _Video("6-30-1920x1080", ".mp4", 26, 20, sound=(0.4, 0.7), variable=True),
    _Video("video5", ".AVI", 15, 15, sound=None),
    _Video("interview_left", ".mp4", 12, 25),
    _Video("10-60-1280x720", ".mp4", 18, 25),  # 25 per second, not 60
    _Video("video20", ".mp4", 16, 25),
    _Video("video21", ".mp4", 9, 25, sound=None),
    _Video("video30", ".mp4", 14, 25, folder="new"),
    _Video("video50", ".mp4", 8, 25),
    _Video("video51", ".mp4", 6, 25, sound=None),
    _Video("video40", ".mp4", 13, 25),
    _Video("7-60-1920x1080", ".mp4", 17, 20, folder="new"),
    _Video("video41", ".avi", 11, 10),
    _Video("spare", ".mp4", 5, 25),
)


@dataclass(frozen=True)
class _Plan:
    """How a trial is made."""

    name: str
    video: str
    split: str
    trap: str
    rows_more: int = 0
    """Rows of the annotation, less frames of the video."""
    num_rows: int | None = None
    au_names: tuple[str, ...] = AU_NAMES
    header_end: str = ""
    line_end: str = "\n"
    start: str = ""
    gaps: tuple[int, ...] = ()
    part: str | None = _FIRST_PART
    no_image: bool = False
    all_unknown: bool = False


_PLANS = (
    _Plan("video1", "video1", "train", "carriage returns; a partly unknown row", line_end="\r\n"),
    _Plan(
        "2-30-640x360", "2-30-640x360", "train",
        "the rate in the name is wrong; one row too few; gap at the start",
        rows_more=-1, gaps=(1, 2, 3),
    ),
    _Plan(
        "video10_1_left", "video10_1", "train",
        "a suffix after a number; the plain trial is in the other split; gap in the middle",
        gaps=(9, 10, 14),
    ),
    _Plan(
        "video10_1", "video10_1", "validation",
        "a number that looks like a suffix; sound ends early; gap at the end", gaps=(20, 21, 22),
    ),
    _Plan(
        "6-30-1920x1080_left", "6-30-1920x1080", "train",
        "variable frame rate; sound starts late; one row too many; gaps everywhere",
        rows_more=1, gaps=(1, 7, 8, 26),
    ),
    _Plan(
        "6-30-1920x1080_right", "6-30-1920x1080", "validation",
        "the other person of a training video; blanks in the header", header_end=" , \t",
        line_end=" \r\n", gaps=(2, 3, 4, 5),
    ),
    _Plan(
        "video5_main", "video5", "validation", "no sound; an upper-case suffix; blank lines at the "
        "end", rows_more=-1,
    ),
    _Plan(
        "interview_left", "interview_left", "train",
        "the video itself is called something_left; byte order mark", start="\ufeff",
    ),
    _Plan(
        "10-60-1280x720", "10-60-1280x720", "train", "legacy header of 8; trailing comma",
        au_names=LEGACY_AU_NAMES, header_end=",",
    ),
    _Plan("video20", "video20", "validation", "no folder of images", part=None),
    _Plan("video21", "video21", "train", "a folder without any image", no_image=True),
    _Plan(
        "video30", "video30", "validation", "second folder of images; video in a sub-folder",
        part=_SECOND_PART, rows_more=1,
    ),
    _Plan("video50", "video50", "train", "not one labelled row", all_unknown=True),
    _Plan("video51", "video51", "validation", "a header and no row", num_rows=0),
    _Plan("video40", "video40", "test", "not all frames are listed", gaps=(1, 6)),
    _Plan("7-60-1920x1080_left", "7-60-1920x1080", "test", "two people", part=_SECOND_PART),
    _Plan("7-60-1920x1080_right", "7-60-1920x1080", "test", "two people", part=_SECOND_PART),
    _Plan("video41", "video41", "test", "one frame more is listed than there is; no image",
          no_image=True),
)  # fmt: skip


@dataclass(frozen=True)
class AdversarialTrial:
    """What is true of one trial, known before any file was written."""

    name: str
    """Name of the trial."""
    split: str
    """`"train"`, `"validation"` or `"test"`."""
    trap: str
    """What a loader may get wrong here."""
    video: Path
    """The video file."""
    video_code: int
    """What the pixels of the video say beside the frame number."""
    image_code: int
    """What the pixels of the cropped images say beside the frame number."""
    timestamps: npt.NDArray[np.float64]
    """`(t,)`, seconds, of each frame of the video."""
    sound: tuple[float, float] | None
    """Start and length in seconds, or `None`."""
    frames: Path | None
    """Folder of cropped images, or `None`."""
    image_numbers: tuple[int, ...]
    """Numbers of the frames that have an image, increasing."""
    au_names: tuple[str, ...]
    """Columns of the annotation; empty in the test set."""
    labels: npt.NDArray[np.int8]
    """`(rows, c)`, as they must be read: a partly unknown row is unknown."""
    decisions: npt.NDArray[np.int8]
    """`(t, 12)`, made-up decisions for the metric and the submission."""

    @property
    def num_frames(self) -> int:
        """Frames `t` of the video."""
        return len(self.timestamps)

    def label_of(self, number: int, au_name: str) -> int:
        """Look up the label of a frame, counted from 1; -1 if it is not known."""
        if number > len(self.labels) or au_name not in self.au_names:
            return -1
        return int(self.labels[number - 1, self.au_names.index(au_name)])


@dataclass(frozen=True)
class AdversarialTruth:
    """What is true of the data root."""

    root: Path
    """The data root."""
    trials: tuple[AdversarialTrial, ...]
    """Every trial of the three splits."""
    example: Path
    """The example file of the test set."""
    submission: bytes
    """The file that a submission of all `decisions` must be, byte for byte."""

    def split(self, name: str) -> tuple[AdversarialTrial, ...]:
        """List the trials of a split, sorted by name."""
        return tuple(sorted((t for t in self.trials if t.split == name), key=lambda t: t.name))

    def counts(self, split: str) -> dict[str, tuple[int, int, int, int]]:
        """Count true and false positives, false and true negatives of `decisions`, per AU."""
        counted = {}
        for column, name in enumerate(AU_NAMES):
            cells = {(1, 1): 0, (1, 0): 0, (0, 1): 0, (0, 0): 0}
            for trial in self.split(split):
                for number in range(1, trial.num_frames + 1):
                    label = trial.label_of(number, name)
                    if label != -1:
                        cells[int(trial.decisions[number - 1, column]), label] += 1
            counted[name] = (cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0])
        return counted

    def mean_f1(self, split: str) -> float:
        """The official metric: F1 of all frames, averaged over the Action Units with positives."""
        scores = [
            2 * hit / (2 * hit + wrong + missed)
            for hit, wrong, missed, _ in self.counts(split).values()
            if hit + missed
        ]
        return sum(scores) / len(scores)


def write_adversarial_root(root: str | Path) -> AdversarialTruth:
    """Write the data root: sixteen videos of a few frames, in about a second.

    It holds: gaps at the start, in the middle and at the end of folders of images; `.DS_Store`,
    `._00001.jpg` and sub-folders in them; a trial without image, one without folder; two parts of
    the images; `_left`, `_right`, `_main` and names that only look so; a plain and a suffixed trial
    in different splits; carriage returns, blanks, commas, a byte order mark and the legacy 8 in
    headers; rows of -1 and one that is partly so; one row too many or too few; rates unlike those
    in the names, one of them variable; sound that is missing, short or late; mp4 and avi.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"`root` must be a new or empty folder; '{root}' is not.")
    videos = {video.name: (code, video) for code, video in enumerate(_VIDEOS, start=100)}
    for code, video in videos.values():
        path = root / "videos" / video.folder / f"{video.name}{video.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_coded_video(
            path,
            code,
            video.milliseconds,
            size=_VIDEO_SIZE,
            average_rate=video.rate,
            sound=_sound(video),
        )
    trials = tuple(
        _write_trial(root, plan, code, *videos[plan.video])
        for code, plan in enumerate(_PLANS, start=1)
    )
    _write_junk(root, trials)
    example = root / "example_submission.txt"
    submission = _write_example(example, [trial for trial in trials if trial.split == "test"])
    return AdversarialTruth(root, trials, example, submission)


# ------------------------------------------------------------------------------------- internals
def _sound(video: _Video) -> tuple[float, float] | None:
    if video.sound is None:
        return None
    start, share = video.sound
    return start, share * float(video.timestamps[-1])


def _bits(value: int, num: int) -> list[int]:
    return [(value >> place) & 1 for place in range(num)]


def _write_trial(
    root: Path, plan: _Plan, code: int, video_code: int, video: _Video
) -> AdversarialTrial:
    num_rows = video.num_frames + plan.rows_more if plan.num_rows is None else plan.num_rows
    annotated = plan.split != "test"
    # The multipliers are odd, so no two rows of a trial are alike: a row tells its frame.
    written = np.array(
        [
            _bits(number * 1103 + code * 577, len(plan.au_names))
            for number in range(1, num_rows + 1)
            if annotated
        ],
        dtype=np.int8,
    ).reshape(-1, len(plan.au_names))
    for number in range(1, len(written) + 1):
        if plan.all_unknown or (number * 7 + code) % 11 == 0:
            written[number - 1] = -1
    labels = written.copy()
    if plan.name == "video1":
        written[4, 3] = -1
        labels[4] = -1
    if annotated:
        _write_annotation(root, plan, written)
    folder = None if plan.part is None else root / plan.part / plan.name
    numbers = tuple(
        number
        for number in range(1, video.num_frames + 1)
        if folder is not None and not plan.no_image and number not in plan.gaps
    )
    if folder is not None:
        folder.mkdir(parents=True)
        for number in numbers:
            write_coded_image(folder / f"{number:05d}.jpg", code, number, size=_IMAGE_SIZE)
    return AdversarialTrial(
        name=plan.name,
        split=plan.split,
        trap=plan.trap,
        video=root / "videos" / video.folder / f"{video.name}{video.suffix}",
        video_code=video_code,
        image_code=code,
        timestamps=video.timestamps,
        sound=_sound(video),
        frames=folder,
        image_numbers=numbers,
        au_names=plan.au_names if annotated else (),
        labels=labels if annotated else np.zeros((0, 0), dtype=np.int8),
        decisions=np.array(
            [
                _bits(number * 769 + code * 331 + 97, len(AU_NAMES))
                for number in range(1, video.num_frames + 1)
            ],
            dtype=np.int8,
        ),
    )


def _write_annotation(root: Path, plan: _Plan, rows: npt.NDArray[np.int8]) -> None:
    path = root / "AU_Detection_Challenge" / _SPLIT_FOLDERS[plan.split] / f"{plan.name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(plan.au_names) + plan.header_end, *(",".join(map(str, r)) for r in rows)]
    text = plan.start + "".join(line + plan.line_end for line in lines)
    if plan.name == "video5_main":
        text += "\n \n\n"
    path.write_bytes(text.encode("utf-8"))


def _write_junk(root: Path, trials: tuple[AdversarialTrial, ...]) -> None:
    for folder in (root, root / "videos", *(root / "AU_Detection_Challenge").iterdir()):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "AU_Detection_Challenge" / "Train_Set" / "._video1.txt").write_bytes(b"\0\5\x16\7")
    (root / "videos" / "._video1.mp4").write_bytes(b"\0\5\x16\7")
    for trial in trials:
        if trial.frames is None:
            continue
        (trial.frames / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (trial.frames / "._00001.jpg").write_bytes(b"\0\5\x16\7")
        (trial.frames / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
        # A sub-folder with an image of the right name and the wrong content.
        (trial.frames / "old").mkdir()
        write_coded_image(trial.frames / "old" / "00001.jpg", 65535, 65535, size=_IMAGE_SIZE)


def _write_example(path: Path, trials: list[AdversarialTrial]) -> bytes:
    """Write the example with zeros everywhere; return what the submission must be."""
    listed: list[tuple[AdversarialTrial, int]] = []
    later: list[tuple[AdversarialTrial, int]] = []
    for trial in sorted(trials, key=lambda trial: trial.name, reverse=True):
        last = trial.num_frames + (trial.name == "video41")
        numbers = [n for n in range(1, last + 1) if not (trial.name == "video40" and n in (3, 4))]
        listed += [(trial, number) for number in numbers[:-2]]
        later += [(trial, number) for number in numbers[-2:]]
    heading = ["image_location", *AU_NAMES]
    given, wanted = [heading], [heading]
    for trial, number in (*listed, *later):
        location = f"{trial.name}/{number:05d}.jpg"
        # The one listed frame that does not exist takes over the decisions of the last.
        decided = trial.decisions[min(number, trial.num_frames) - 1]
        given.append([location, *["0"] * len(AU_NAMES)])
        wanted.append([location, *(str(int(value)) for value in decided)])
    path.write_bytes("".join(",".join(row) + "\r\n" for row in given).encode())
    return "".join(",".join(row) + "\n" for row in wanted).encode()
