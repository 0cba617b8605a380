"""Render a whole data set to disk in the layout of Aff-Wild2."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmau._checks import check_range
from mmau._files import atomic_write
from mmau.action_units import AU_NAMES
from mmau.progress import ProgressCallback
from mmau.synthetic.clip import DEFAULT_SIZE, plan_clip, render_clip
from mmau.synthetic.config import SyntheticConfig
from mmau.synthetic.face_warp import Face, load_faces
from mmau.synthetic.manifest import TRUTH_FILE, write_readme, write_truth
from mmau.synthetic.movie import write_movie
from mmau.synthetic.photographs import PHOTOGRAPHS

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
    num_frames: int
    fps: float
    size: int
    config: SyntheticConfig

    @property
    def video(self) -> Path:
        return self.root / "videos" / f"{self.name}.mp4"

    @property
    def annotation(self) -> Path:
        return self.root / "AU_Detection_Challenge" / self.split / f"{self.name}.txt"

    @property
    def what(self) -> dict[str, Any]:
        return {
            "photograph": self.photograph,
            "num_frames": self.num_frames,
            "fps": self.fps,
            "config": self.config,
        }


def render_dataset(
    root: str | Path,
    *,
    num_train: int = 160,
    num_validation: int = 40,
    num_frames: int = 160,
    fps: float = 15.0,
    size: int = DEFAULT_SIZE,
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
        num_frames: Frames per clip.
        fps: Frames per second.
        size: Side of the square picture in pixels, even.
        seed: Non-negative; the same seed gives the same labels, pixels and sound.
        config: The difficulty knobs; defaults if `None`.
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
    if size < 32 or size % 2:
        raise ValueError(f"`size` must be an even number of pixels, at least 32; got {size!r}.")
    settings = {
        "format": _FORMAT,
        "seed": seed,
        "num_train": num_train,
        "num_validation": num_validation,
        "num_frames": num_frames,
        "fps": fps,
        "size": size,
        "config": asdict(config),
    }
    todo = [
        _Job(
            root=root,
            name=f"{split.split('_')[0].lower()}_{index:04d}",
            split=split,
            seed=(seed, number, index),
            photograph=tuple(PHOTOGRAPHS)[index % len(PHOTOGRAPHS)],
            num_frames=num_frames,
            fps=fps,
            size=size,
            config=config,
        )
        for number, (split, count) in enumerate(
            zip(_SPLITS, (num_train, num_validation), strict=True)
        )
        for index in range(count)
    ]
    plans = {job.name: plan_clip(job.seed, **job.what) for job in todo}  # refuses bad values early
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
        write_readme(root / "README.txt", num_train=num_train, num_validation=num_validation)
        write_truth(root / TRUTH_FILE, settings, plans)
        (root / _PLAN_FILE).unlink(missing_ok=True)
    return root


def _claim(root: Path, settings: dict[str, Any]) -> bool:
    """Make sure that the folder is ours; tell whether it is complete already."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"`root` must be a folder; '{root}' is a file.")
    for name in (TRUTH_FILE, _PLAN_FILE):
        if (root / name).is_file():
            found = json.loads((root / name).read_text(encoding="utf-8"))["settings"]
            # A folder from before a knob existed was rendered with its default.
            found["config"] = asdict(SyntheticConfig()) | found.get("config", {})
            found, wanted = (json.loads(json.dumps(one)) for one in (found, settings))
            differing = [key for key in wanted if found.get(key) != wanted[key]]
            if differing:
                raise ValueError(
                    f"'{root}' holds synthetic data with other settings ({', '.join(differing)}); "
                    "choose another folder or delete this one."
                )
            return name == TRUTH_FILE
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(
            f"'{root}' holds files that are no synthetic data; choose a new or empty folder."
        )
    with atomic_write(root / _PLAN_FILE) as unfinished:
        unfinished.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    return False


_worker_faces: tuple[Face, ...] = ()


def _start_worker(faces: tuple[Face, ...]) -> None:
    """Give a fresh process the meshes that the parent found, so that it needs no MediaPipe."""
    global _worker_faces
    _worker_faces = faces
    torch.set_num_threads(1)


def _work(job: _Job) -> str:
    return _render_one(job, _worker_faces)


def _render_one(job: _Job, faces: Sequence[Face]) -> str:
    clip = render_clip(job.seed, size=job.size, faces=faces, **job.what)
    write_movie(
        job.video, clip.frames, fps=job.fps, waveform=clip.waveform, sample_rate=clip.sample_rate
    )
    _write_annotation(job.annotation, clip.labels)
    return job.name


def _render_all(todo: Sequence[_Job], jobs: int) -> Iterator[str]:
    faces = load_faces()
    if jobs == 1:
        for job in todo:
            yield _render_one(job, faces)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(faces,),
    )
    try:
        for future in as_completed([pool.submit(_work, job) for job in todo]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_annotation(path: Path, labels: np.ndarray) -> None:
    rows = [",".join(AU_NAMES), *(",".join(map(str, row)) for row in labels.tolist())]
    with atomic_write(path) as unfinished:
        unfinished.write_text("\n".join(rows) + "\n", encoding="utf-8")
