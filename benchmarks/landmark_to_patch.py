"""Measure the landmark mapper against a plain Python loop.

    python benchmarks/landmark_to_patch.py        # a minute on one idle core
    python benchmarks/landmark_to_patch.py --quick

prints a table and (unless `--quick`) writes `benchmarks/results/landmark_to_patch_modes.json`. The
rival is `_landmark_loop.py`, the oracle of the tests: one frame, one region, one landmark after the
other in lists and sets, and one tensor of them all at the end. It is linear in the frames, so its
slower modes are measured on fewer of them and scaled. CPU time on one thread, the smallest of
several runs taken in turns within one process. Patch sets are compared in float64, where both round
alike.
"""

from __future__ import annotations

import functools

import torch
from _landmark_loop import region_weights
from _measure import smallest_times
from _report import ONE_PROCESS, Row, start, write
from torch import Tensor

from mmau.functional.landmark_patches import PATCH_MODES
from mmau.modules import LandmarkToPatch

REGIONS = {
    "right_brow": range(17, 22),
    "left_brow": range(22, 27),
    "glabella": (20, 21, 22, 23, 27),
    "nose_bridge": range(27, 31),
    "nose_base": range(31, 36),
    "right_eye": range(36, 42),
    "left_eye": range(42, 48),
    "upper_lip": (*range(48, 55), *range(60, 65)),
    "lower_lip": (48, *range(54, 61), *range(64, 68)),
    "jaw": range(4, 13),
}
LOOP_FRAMES = {"points": 4096, "bbox": 1024, "hull": 256, "gaussian": 8}
"""Frames on which the loop is measured."""
GRID, IMAGE = (16, 16), (224, 224)


def faces(frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw landmarks all over the picture; some are lost, off the picture or on a border."""
    generator = torch.Generator().manual_seed(0)
    landmarks = -10 + 244 * torch.rand(frames, 68, 2, generator=generator, dtype=dtype)
    fate = torch.rand(frames, 68, generator=generator)
    landmarks[fate < 0.02] = torch.nan
    landmarks[(fate > 0.02) & (fate < 0.03)] = torch.inf
    border = (fate > 0.03) & (fate < 0.08)
    landmarks[border] = 14 * (landmarks[border] / 14).round()
    return landmarks


def loop(landmarks: Tensor, mode: str) -> Tensor:
    """Run the loop over all frames and return what the mapper returns."""
    regions = [list(indices) for indices in REGIONS.values()]
    rows = [
        region_weights(frame, regions, GRID, IMAGE, mode=mode)[0] for frame in landmarks.tolist()
    ]
    return torch.tensor(rows, dtype=landmarks.dtype)


def differing_sets(mode: str, frames: int) -> int:
    """Return in how many regions the mapper and the loop disagree."""
    landmarks = faces(frames, torch.float64)
    ours = LandmarkToPatch(REGIONS, mode=mode)(landmarks, GRID, IMAGE).weights.double()
    theirs = loop(landmarks, mode)
    if mode == "gaussian":
        return int((~torch.isclose(ours, theirs, rtol=1e-9, atol=1e-15)).any(-1).sum())
    return int(((ours > 0) != (theirs > 0)).any(-1).sum())


def measure(frames: int, repeats: int) -> list[Row]:
    """Measure every mode on its own regions, and the default scheme with its derived points."""
    rows = []
    landmarks = faces(frames)
    for mode in PATCH_MODES:
        some = landmarks[: min(LOOP_FRAMES[mode], frames)]
        mapper = LandmarkToPatch(REGIONS, mode=mode)
        default = LandmarkToPatch("ibug68", mode=mode)
        times = smallest_times(
            {
                "ours": functools.partial(mapper, landmarks, GRID, IMAGE),
                "ibug68": functools.partial(default, landmarks, GRID, IMAGE),
                "loop": functools.partial(loop, some, mode),
            },
            repeats=repeats,
        )
        looped = times["loop"] * frames / len(some)
        rows.append(
            {
                "mode": mode,
                "size": {"frames": frames, "regions": len(REGIONS), "patches": GRID[0] * GRID[1]},
                "mapper, ms": 1e3 * times["ours"],
                "loop, ms": 1e3 * looped,
                "loop measured on": f"{len(some)} frames",
                "times faster": looped / times["ours"],
                "13 regions with derived points, ms": 1e3 * times["ibug68"],
                "regions that differ": differing_sets(mode, len(some)),
            }
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__)
    note = (
        f"On a 16 x 16 grid. {ONE_PROCESS} The loop is plain Python; where it was measured on "
        "fewer frames, it is scaled."
    )
    rows = measure(512 if quick else 4096, 3 if quick else 7)
    write(folder, "landmark_to_patch_modes", "Landmarks to patches: times", note, where, rows)


if __name__ == "__main__":
    main()
