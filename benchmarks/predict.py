"""Measure `mmau predict`: frames per second of each stage, peak memory, cost of a live step.

    python benchmarks/predict.py               # about ten minutes on one idle core
    python benchmarks/predict.py --quick       # two minutes, ten minutes of film instead of an hour

prints tables, says which demands are met, and (unless `--quick`) writes
`benchmarks/results/predict*.json`. The film is 640 x 360 with sound: a rendered face that moves and
opens its mouth. The model is the small one of the demo, with random weights, on a CPU: what is
measured is everything around the encoders, and a large encoder adds its own time and its own
constant memory.

Memory is the peak resident size of a fresh process that runs `mmau predict` on the whole file. To
keep an hour of film affordable it has few frames per second (said in the table); the sound is
whole. The stages are wall time on one thread, the smallest of several runs; steps are CPU time.
"""

from __future__ import annotations

import argparse
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
from _measure import stamp
from _report import RESULTS, Row, show, write

from mmau.inference import AUPredictor, LogitStream, StageTimes
from mmau.media.video import VideoReader
from mmau.models import Component, DetectorConfig, build_detector
from mmau.synthetic import render_face

HEIGHT, WIDTH, RATE = 360, 640, 16_000


# ---------------------------------------------------------------------- what is measured on
def render_pictures() -> np.ndarray:
    """Return `(t, h, w, 3)`: a face that drifts through the picture and opens its mouth."""
    intensities = np.zeros((8, 12))
    intensities[:, -2:] = np.linspace(0, 1, 8)[:, None]
    faces = render_face(intensities, size=320)[0]
    drift = np.round(120 * np.sin(2 * np.pi * np.arange(40) / 40)).astype(int)
    pictures = np.full((40, HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    for index, shift in enumerate(drift):
        left = 160 + shift
        pictures[index, 20:340, left : left + 320] = faces[abs(index % 14 - 7)]
    return pictures


def write_film(path: Path, pictures: np.ndarray, *, seconds: float, fps: float) -> None:
    """Write a film of any length without holding it."""
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
            frame = av.VideoFrame.from_ndarray(pictures[index % len(pictures)], format="rgb24")
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
def measure_stages(predictor: AUPredictor, film: Path, repeats: int) -> list[Row]:
    """Return frames per second of every stage of `predict_file`, the fastest run of each."""
    runs = []
    for _ in range(repeats):
        stages = StageTimes()
        predictor.predict_file(film, stages=stages)
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


def peak_of_predict(film: Path, checkpoint: Path, table: Path) -> tuple[float, float]:
    """Return the peak resident size in megabytes and the seconds of `mmau predict`."""
    command = [sys.executable, "-m", "mmau.cli", "predict", film, "--checkpoint", checkpoint]
    started = time.monotonic()
    child = subprocess.Popen(
        [str(word) for word in (*command, "-o", table, "--quiet")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # The usage of this one child: getrusage would give the largest of all there ever were.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"mmau predict failed on {film}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024, time.monotonic() - started


def measure_memory(
    folder: Path, checkpoint: Path, pictures: np.ndarray, *, minutes: tuple[float, ...], fps: float
) -> list[Row]:
    """Return the peak of a process for films of several lengths."""
    rows = []
    for length in minutes:
        film, table = folder / f"{length:g}.mp4", folder / "table.csv"
        write_film(film, pictures, seconds=60 * length, fps=fps)
        megabytes, seconds = peak_of_predict(film, checkpoint, table)
        with table.open() as lines:
            rows_written = sum(1 for _ in lines) - 1
        film.unlink()
        rows.append(
            {
                "film": f"{length:g} min, {WIDTH} x {HEIGHT}, {fps:g} frames/s",
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


def measure_steps(predictor: AUPredictor, film: Path, steps: int) -> list[Row]:
    """Return the cost of one live step at the start of a stream and later on."""
    with VideoReader(film) as reader:
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
def demands(memory: list[Row], steps: list[Row]) -> list[Row]:
    """Hold what was measured against what was asked for."""
    longest = memory[-1]
    late, early = steps[1]["median, ms"], steps[0]["median, ms"]
    return [
        {
            "demand": f"peak memory of {longest['film']} <= 1.3 times that of 1 min",
            "measured": longest["times the shortest"],
            "met": "yes" if longest["times the shortest"] <= 1.3 else "MISSED",
        },
        {
            "demand": "a late step costs <= 1.3 times an early one",
            "measured": round(late / early, 3),
            "met": "yes" if late <= 1.3 * early else "MISSED",
        },
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter film, no files")
    parser.add_argument("--minutes", type=float, help="length of the long film")
    parser.add_argument("--fps", type=float, default=5.0, help="frames per second of both")
    parser.add_argument("--repeats", type=int, help="runs of which the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quick = arguments.quick
    minutes = arguments.minutes or (10 if quick else 60)
    where = stamp()
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()))
    predictor = AUPredictor(build_detector(small_config()), crop_size=64)
    pictures = render_pictures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = predictor.detector.save_pretrained(folder / "checkpoint")
        film = folder / "stages.mp4"
        write_film(film, pictures, seconds=20 if quick else 40, fps=25)
        stages = measure_stages(predictor, film, arguments.repeats or (2 if quick else 3))
        show("Stages of mmau predict, 640 x 360, one thread", stages)
        steps = measure_steps(predictor, film, 600 if quick else 3000)
        steps += measure_temporal_step(200 if quick else 1000)
        show("One live step", steps)
        print("\nPeak memory of the process", flush=True)
        memory = measure_memory(
            folder, checkpoint, pictures, minutes=(1.0, minutes), fps=arguments.fps
        )
        show("Peak memory of mmau predict", memory)
    asked_for = demands(memory, steps)
    show("Demands", asked_for)
    if quick:
        return
    model = "The model is the demo's small one; the film is 640 x 360 with one face and sound. "
    write(RESULTS / "predict.json", "Predict: demands", model, where, asked_for)
    write(RESULTS / "predict_stages.json", "Predict: stages, one thread", model, where, stages)
    write(
        RESULTS / "predict_memory.json",
        "Predict: peak memory of the process",
        f"{model}Few frames per second, so that an hour is affordable; the sound is whole.",
        where,
        memory,
    )
    write(
        RESULTS / "predict_steps.json",
        "Predict: one live step",
        f"{model}The temporal models alone have the paper's widths.",
        where,
        steps,
    )


if __name__ == "__main__":
    main()
