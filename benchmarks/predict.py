"""Measure `mmau predict`: frames per second of each stage, peak memory, cost of a live step.

    python benchmarks/predict.py               # about ten minutes on one idle core
    python benchmarks/predict.py --quick       # two minutes: ten minutes of video, not an hour

prints tables and (unless `--quick`) writes `benchmarks/results/predict*.json`. The video is 640 x
360 with sound: a rendered face that moves and opens its mouth. The model is the small one of the
demo, with random weights, on a CPU: what is measured is everything around the encoders, and a large
encoder adds its own time and its own constant memory.

Memory is the peak resident size of a fresh process that runs `mmau predict` on the whole file. To
keep an hour of video affordable it has few frames per second (said in the table); the sound is
whole. The stages are wall time on one thread, the smallest of several runs; steps are CPU time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from _report import Row, start, write

from mmau.inference import AUPredictor, LogitStream, StageTimes
from mmau.media.video import VideoReader
from mmau.models import Component, DetectorConfig, build_detector, save_pretrained
from mmau.synthetic import render_face

HEIGHT, WIDTH, RATE = 360, 640, 16_000


# ---------------------------------------------------------------------- what is measured on
def render_images() -> np.ndarray:
    """Return `(t, h, w, 3)`: a face that drifts through the image and opens its mouth."""
    intensities = np.zeros((8, 12))
    intensities[:, -2:] = np.linspace(0, 1, 8)[:, None]
    faces = render_face(intensities, size=320)[0]
    drift = np.round(120 * np.sin(2 * np.pi * np.arange(40) / 40)).astype(int)
    images = np.full((40, HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    for index, shift in enumerate(drift):
        left = 160 + shift
        images[index, 20:340, left : left + 320] = faces[abs(index % 14 - 7)]
    return images


def write_video(path: Path, images: np.ndarray, *, seconds: float, fps: float) -> None:
    """Write a video of any length without holding it."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 10 * RATE).astype(np.float32)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "23"}
        sound = out.add_stream("aac", rate=RATE)
        sound.layout = "mono"
        sent = 0
        for index in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(images[index % len(images)], format="rgb24")
            frame.pts, frame.time_base = index, 1 / Fraction(fps).limit_denominator(1000)
            out.mux(video.encode(frame))
            while sent < (index + 1) / fps * RATE:
                block = noise[None, sent % (9 * RATE) :][:, :1024]
                samples = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block), format="fltp", layout="mono"
                )
                samples.sample_rate, samples.pts = RATE, sent
                samples.time_base = Fraction(1, RATE)
                out.mux(sound.encode(samples))
                sent += 1024
        out.mux(video.encode())
        out.mux(sound.encode())


def small_config() -> DetectorConfig:
    """Return the sizes of the recipe's demo."""
    return DetectorConfig(
        visual=Component("tiny"),
        audio=Component("log_mel", {"num_mels": 24, "causal": True}),
        d_region=32,
        num_heads=4,
        d_model=64,
        d_audio=32,
        crop_size=64,
    )


# ---------------------------------------------------------------------- measurements
def measure_stages(predictor: AUPredictor, video: Path, repeats: int) -> list[Row]:
    """Return frames per second of every stage of `predict_file`, the fastest run of each."""
    runs = []
    for _ in range(repeats):
        stages = StageTimes()
        predictor.predict_file(video, stages=stages)
        runs.append(stages)
    frames = runs[0].num_frames
    best = {name: min(run.seconds[name] for run in runs) for name in runs[0].seconds}
    total = sum(best.values())
    return [
        {
            "stage": name,
            "frames per second": round(frames / seconds, 1),
            "ms per frame": round(1000 * seconds / frames, 3),
            "share": round(seconds / total, 3),
        }
        for name, seconds in (*best.items(), ("all", total))
    ]


def peak_of_predict(video: Path, checkpoint: Path, table: Path) -> tuple[float, float]:
    """Return the peak resident size in megabytes and the seconds of `mmau predict`."""
    command = [sys.executable, "-m", "mmau.cli", "predict", video, "--checkpoint", checkpoint]
    started = time.monotonic()
    child = subprocess.Popen(
        [str(word) for word in (*command, "-o", table, "--quiet")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # The usage of this one child: getrusage would give the largest of all there ever were.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"mmau predict failed on {video}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024, time.monotonic() - started


def measure_memory(
    folder: Path,
    checkpoint: Path,
    images: np.ndarray,
    *,
    minutes: tuple[float, ...],
    fps: float = 5.0,
) -> list[Row]:
    """Return the peak of a process for videos of several lengths."""
    rows = []
    for length in minutes:
        video, table = folder / f"{length:g}.mp4", folder / "table.csv"
        write_video(video, images, seconds=60 * length, fps=fps)
        megabytes, seconds = peak_of_predict(video, checkpoint, table)
        with table.open() as lines:
            rows_written = sum(1 for _ in lines) - 1
        video.unlink()
        rows.append(
            {
                "video": f"{length:g} min, {WIDTH} x {HEIGHT}, {fps:g} frames/s",
                "frames": rows_written,
                "peak, MB": round(megabytes, 1),
                "times the shortest": round(
                    megabytes / (rows[0]["peak, MB"] if rows else megabytes), 3
                ),
                "seconds": round(seconds, 1),
            }
        )
        print(f"  {rows[-1]}", flush=True)
    return rows


def measure_steps(predictor: AUPredictor, video: Path, steps: int) -> list[Row]:
    """Return the cost of one live step at the start of a stream and later on."""
    with VideoReader(video) as reader:
        frames = [frame.image for _, frame in zip(range(100), reader, strict=False)]
    rows: list[Row] = []
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, RATE // 25).astype(np.float32)
    stages = StageTimes(clock=time.process_time)
    costs = []
    with predictor.live(stages=stages) as session:
        for number in range(steps):
            start = time.process_time()
            session.step(frames[number % len(frames)], (number + 1) / 25, samples)
            costs.append(time.process_time() - start)
    for what, part in (
        ("frames 50 to 250", costs[50:250]),
        (f"the last 200 of {steps}", costs[-200:]),
    ):
        rows.append(
            {
                "step": f"camera frame to row, {what}",
                "median, ms": round(1000 * float(np.median(part)), 2),
                "95 %, ms": round(1000 * float(np.quantile(part, 0.95)), 2),
            }
        )
    for name, seconds in stages.seconds.items():
        if seconds:
            rows.append(
                {
                    "step": f"of which {name}, mean",
                    "median, ms": round(1000 * seconds / steps, 2),
                    "95 %, ms": "-",
                }
            )
    return rows


def measure_temporal_step(steps: int) -> list[Row]:
    """Return the cost of one step of the temporal model alone, at the sizes of the paper."""
    rows: list[Row] = []
    for name, options in (("agssm", {}), ("tcn", {}), ("transformer", {"window": 256})):
        torch.manual_seed(0)
        config = DetectorConfig(
            visual=Component("tiny"),
            audio=Component("log_mel"),
            d_region=32,
            num_heads=4,
            temporal=Component(name, options),
            crop_size=64,
        )
        stream = LogitStream(build_detector(config).eval())
        visual, audio = torch.randn(steps, 768), torch.randn(steps, 256)
        costs = []
        for number in range(steps):
            start = time.process_time()
            stream.push(visual[number : number + 1], audio[number : number + 1])
            costs.append(time.process_time() - start)
        rows.append(
            {
                "step": f"temporal model alone, {name}, d_model 768",
                "median, ms": round(1000 * float(np.median(costs[20:])), 3),
                "95 %, ms": round(1000 * float(np.quantile(costs[20:], 0.95)), 3),
            }
        )
    return rows


# ---------------------------------------------------------------------- report
def main() -> None:
    """Measure, print, write."""
    quick, folder, where = start(__doc__)
    torch.manual_seed(0)
    model = "The model is the demo's small one; the video is 640 x 360 with one face and sound."
    predictor = AUPredictor(build_detector(small_config()), crop_size=64)
    images = render_images()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoint = save_pretrained(predictor.detector, work / "checkpoint")
        video = work / "stages.mp4"
        write_video(video, images, seconds=20 if quick else 40, fps=25)
        stages = measure_stages(predictor, video, 2 if quick else 3)
        write(folder, "predict_stages", "Predict: stages, one thread", model, where, stages)
        steps = measure_steps(predictor, video, 600 if quick else 3000)
        steps += measure_temporal_step(200 if quick else 1000)
        note = f"{model} The temporal models alone have the paper's widths."
        write(folder, "predict_steps", "Predict: one live step", note, where, steps)
        note = f"{model} Few frames per second, so that an hour is affordable; the sound is whole."
        memory = measure_memory(work, checkpoint, images, minutes=(1.0, 10.0 if quick else 60.0))
        write(folder, "predict_memory", "Predict: peak memory of the process", note, where, memory)


if __name__ == "__main__":
    main()
