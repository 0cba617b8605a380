"""A rendered data set on disk: video files, the truth behind them, and the layout of Aff-Wild2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmau._checks import check_range
from mmau._files import atomic_write
from mmau._optional import require
from mmau._pool import Work, run_in_processes
from mmau.action_units import AU_NAMES
from mmau.progress import ProgressCallback
from mmau.synthetic.clips import ClipPlan, hidden_ranges, plan_clip, render_clip
from mmau.synthetic.photographs import PHOTOGRAPHS
from mmau.synthetic.timeline import Event, SyntheticConfig, intensities_at
from mmau.synthetic.warp import Face, load_faces

_AAC_BLOCK = 1024


def write_movie(
    path: str | Path,
    frames: np.ndarray,
    *,
    fps: float,
    waveform: np.ndarray | None = None,
    sample_rate: int = 44_100,
    crf: int = 20,
) -> Path:
    """Write an mp4 file whose frame `i` is shown at `i / fps` seconds.

    The sound starts with the first frame. The same input gives the same file, byte for byte.

    Args:
        path: Where to write; the file appears only when it is complete.
        frames: `(t, h, w, 3)` uint8 RGB; `h` and `w` even.
        fps: Frames per second.
        waveform: `(n,)` float in [-1, 1], mono, or `None` for a file without a sound track.
        sample_rate: Samples of `waveform` per second, in Hz.
        crf: Constant rate factor of H.264, 0 (lossless) to 51.

    Returns:
        The path.

    Raises:
        ValueError: If a shape or type is wrong or a value is out of range.
        MissingDependencyError: If PyAV is not installed.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(
            f"`frames` must be uint8 of shape (t, h, w, 3); got {frames.dtype} {frames.shape}."
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"`frames` must have an even height and width for H.264; got {frames.shape[1:3]}."
        )
    if waveform is not None and (waveform.ndim != 1 or not len(waveform)):
        raise ValueError(f"`waveform` must have shape (n,); got {waveform.shape}.")
    check_range("fps", fps, 0, open_low=True)
    check_range("crf", crf, 0, 51)
    av = require("av", purpose="rendering clips", extra="recipes")
    rate = Fraction(fps).limit_denominator(10_000)
    with (
        atomic_write(path) as unfinished,
        av.open(str(unfinished), "w", format="mp4") as container,
    ):
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        # One thread, and no macroblock tree: x264's is not the same from run to run.
        params = "threads=1:mbtree=0"
        video.options = {"crf": str(crf), "preset": "veryfast", "x264-params": params}
        video.thread_count = 1
        sound = None
        if waveform is not None:
            sound = container.add_stream("aac", rate=sample_rate)
            sound.layout = "mono"
        sent = 0
        for index, pixels in enumerate(frames):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            image.pts, image.time_base = index, 1 / rate
            container.mux(video.encode(image))
            # Sound goes in beside the images, so that a player need not seek.
            while sound is not None and waveform is not None and sent < len(waveform):
                if sent > (index + 1) / fps * sample_rate and index + 1 < len(frames):
                    break
                block = waveform[None, sent : sent + _AAC_BLOCK].astype(np.float32)
                samples = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = sample_rate, sent
                samples.time_base = Fraction(1, sample_rate)
                container.mux(sound.encode(samples))
                sent += block.shape[1]
        container.mux(video.encode())
        if sound is not None:
            container.mux(sound.encode())
    return Path(path)


# ------------------------------------------------------------------ the truth
TRUTH_FILE = "truth.json"
"""Written last: a folder that has it is complete."""

_README = """Synthetic clips in the layout of Aff-Wild2, rendered by mmau

What they are: {num_train} training and {num_validation} validation clips. Two photographs, warped
by rules that stand for twelve Action Units, with synthesised sounds that precede some movements.
They exist so that the whole chain, from a video file with sound to scores, can be run and tested
by anyone without a licence or a download.

What they are not: recordings of real expressions. The two people did not make these expressions,
the sounds are not voices, and the names of the episodes in {truth} are names of movement
combinations, not of feelings. Both photographs appear in both splits, with other proportions in
each clip: a score on these data says that the pipeline learns. It says nothing about Aff-Wild2 or
about real faces.

Layout: videos/<name>.mp4 (H.264, AAC); AU_Detection_Challenge/Train_Set/<name>.txt and
Validation_Set/<name>.txt (a header, then one row of 0 or 1 per frame); {truth}
(events, frames without a visible face, seeds, settings). Labels hold in every
frame, also where the face is hidden.

The photographs:
{credits}
"""


def _write_truth(path: Path, settings: Mapping[str, Any], plans: Mapping[str, ClipPlan]) -> None:
    document = {
        "settings": dict(settings),
        "au_names": list(AU_NAMES),
        "photographs": {name: asdict(info) for name, info in PHOTOGRAPHS.items()},
        "clips": {
            name: {
                "seed": list(plan.seed),
                "photograph": plan.photograph,
                "mirrored": plan.mirrored,
                "hidden_frames": hidden_ranges(plan.hidden),
                "events": [asdict(event) for event in plan.events],
            }
            for name, plan in plans.items()
        },
    }
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _read_settings(path: Path) -> dict[str, Any]:
    """Settings of a folder, those of earlier versions in the form of this one."""
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    config = settings.setdefault("config", {})
    if "mood" in config:
        config["context"] = config.pop("mood")
    for name in ("num_frames", "fps", "size"):
        if name in settings:
            config[name] = settings.pop(name)
    # A folder from before an option existed was rendered with its default.
    settings["config"] = json.loads(json.dumps(asdict(SyntheticConfig()))) | config
    return settings


def read_truth(root: str | Path) -> dict[str, ClipPlan]:
    """Read what is behind each clip of a rendered data set.

    Args:
        root: Folder that `render_dataset` wrote.

    Returns:
        Name of a clip to its plan: events, hidden frames, intensities, labels.

    Raises:
        FileNotFoundError: If the folder has no complete rendering.
    """
    path = Path(root) / TRUTH_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {TRUTH_FILE} in '{Path(root)}'; it is the last file that render_dataset writes."
        )
    config = _read_settings(path)["config"]
    timestamps = np.arange(config["num_frames"]) / config["fps"]
    plans = {}
    for name, clip in json.loads(path.read_text(encoding="utf-8"))["clips"].items():
        events = tuple(Event(**event) for event in clip["events"])
        intensities = intensities_at(events, timestamps)
        hidden = np.zeros(len(timestamps), dtype=bool)
        for start, stop in clip["hidden_frames"]:
            hidden[start:stop] = True
        plans[name] = ClipPlan(
            seed=tuple(clip["seed"]),
            photograph=clip["photograph"],
            mirrored=clip["mirrored"],
            timestamps=timestamps,
            events=events,
            hidden=hidden,
            intensities=intensities,
            labels=(intensities >= config["label_threshold"]).astype(np.int8),
        )
    return plans


def _write_readme(path: Path, *, num_train: int, num_validation: int) -> None:
    credits_text = "\n".join(
        f"- {info.title}. {info.credit}. {info.licence}. Loaded with {info.source}."
        for info in PHOTOGRAPHS.values()
    )
    text = _README.format(
        num_train=num_train, num_validation=num_validation, truth=TRUTH_FILE, credits=credits_text
    )
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ the data set
_FORMAT = 1
_PLAN_FILE = ".rendering.json"
_SPLITS = ("Train_Set", "Validation_Set")


@dataclass(frozen=True)
class _Job:
    """One clip to render; crosses the border to a worker process."""

    root: Path
    name: str
    split: str
    seed: tuple[int, ...]
    photograph: str
    config: SyntheticConfig

    @property
    def video(self) -> Path:
        return self.root / "videos" / f"{self.name}.mp4"

    @property
    def annotation(self) -> Path:
        return self.root / "AU_Detection_Challenge" / self.split / f"{self.name}.txt"


def render_dataset(
    root: str | Path,
    *,
    num_train: int = 160,
    num_validation: int = 40,
    seed: int = 0,
    config: SyntheticConfig | None = None,
    jobs: int = 1,
    progress: ProgressCallback | None = None,
) -> Path:
    """Render a mini data set from two public-domain photographs, in the layout of Aff-Wild2.

    Writes `videos/<name>.mp4`, `AU_Detection_Challenge/{Train_Set,Validation_Set}/<name>.txt`,
    `README.txt` and, last, `truth.json`. Every file appears only when it is complete. Called again
    with the same settings it renders what is missing; a complete folder costs nothing.

    With `jobs` above 1, clips are rendered in spawned processes: call it under
    `if __name__ == "__main__":` in a script. The files do not depend on `jobs`.

    Args:
        root: Folder to write to; new, empty, or from an earlier call with the same settings.
        num_train: Number of training clips.
        num_validation: Number of validation clips.
        seed: Non-negative; the same seed gives the same labels, pixels and sound.
        config: Size, difficulty and appearance of the clips; defaults if `None`.
        jobs: Number of processes.
        progress: Called as `progress(done, total)` after each clip, in this process.

    Returns:
        `root` as a path.

    Raises:
        ValueError: If a value is out of range, or the folder holds something else.
        MissingDependencyError: If PyAV, matplotlib, scikit-image or MediaPipe is not installed.
    """
    root = Path(root)
    config = config or SyntheticConfig()
    check_range("num_train", num_train, 0)
    check_range("num_validation", num_validation, 0)
    check_range("jobs", jobs, 1)
    settings = {
        "format": _FORMAT,
        "seed": seed,
        "num_train": num_train,
        "num_validation": num_validation,
        "config": asdict(config),
    }
    todo = [
        _Job(
            root=root,
            name=f"{split.split('_')[0].lower()}_{index:04d}",
            split=split,
            seed=(seed, number, index),
            photograph=tuple(PHOTOGRAPHS)[index % len(PHOTOGRAPHS)],
            config=config,
        )
        for number, (split, count) in enumerate(
            zip(_SPLITS, (num_train, num_validation), strict=True)
        )
        for index in range(count)
    ]
    plans = {  # before anything is written: refuses a bad seed
        job.name: plan_clip(job.seed, config, photograph=job.photograph) for job in todo
    }
    complete = _claim(root, settings)
    missing = [job for job in todo if not (job.video.is_file() and job.annotation.is_file())]
    done = len(todo) - len(missing)
    if done and progress:
        progress(done, len(todo))
    if missing:
        for _ in _render_all(missing, jobs):
            done += 1
            if progress:
                progress(done, len(todo))
    if missing or not complete:
        for split in _SPLITS:
            (root / "AU_Detection_Challenge" / split).mkdir(parents=True, exist_ok=True)
        _write_readme(root / "README.txt", num_train=num_train, num_validation=num_validation)
        _write_truth(root / TRUTH_FILE, settings, plans)
        (root / _PLAN_FILE).unlink(missing_ok=True)
    return root


def _claim(root: Path, settings: dict[str, Any]) -> bool:
    """Make sure that the folder is for these settings; tell whether it is complete already."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"`root` must be a folder; '{root}' is a file.")
    for name in (TRUTH_FILE, _PLAN_FILE):
        if (root / name).is_file():
            found, wanted = _read_settings(root / name), json.loads(json.dumps(settings))
            found, wanted = ({**one, **one["config"], "config": None} for one in (found, wanted))
            differing = [key for key in wanted if found.get(key) != wanted[key]]
            if differing:
                raise ValueError(
                    f"'{root}' holds synthetic data with other settings ({', '.join(differing)}); "
                    "choose another folder or delete this one."
                )
            return name == TRUTH_FILE
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(
            f"'{root}' holds files that are not synthetic data; choose a new or empty folder."
        )
    with atomic_write(root / _PLAN_FILE) as unfinished:
        unfinished.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    return False


def _render_one(job: _Job, faces: Sequence[Face]) -> None:
    clip = render_clip(job.seed, job.config, photograph=job.photograph, faces=faces)
    write_movie(
        job.video,
        clip.frames,
        fps=job.config.fps,
        waveform=clip.waveform,
        sample_rate=clip.sample_rate,
    )
    rows = [",".join(AU_NAMES), *(",".join(map(str, row)) for row in clip.labels.tolist())]
    with atomic_write(job.annotation) as unfinished:
        unfinished.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _render_all(todo: Sequence[_Job], jobs: int) -> Iterator[None]:
    """Render clips, yielding after each."""
    faces = load_faces()
    if jobs == 1:
        for job in todo:
            _render_one(job, faces)
            yield
        return
    # The meshes travel to each process, so that a fresh one needs no MediaPipe.
    named = {str(job.video): job for job in todo}
    for _, future in run_in_processes(named, _start_renderer, faces, jobs):
        future.result()
        yield


def _start_renderer(faces: Sequence[Face]) -> Work[_Job, None]:
    """Get a process ready to render."""
    torch.set_num_threads(1)
    return lambda job, progress: _render_one(job, faces)
