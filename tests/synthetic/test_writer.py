"""The data set on disk: layout, decoding, timing, and no half files."""

import json
import re

import av
import numpy as np
import pytest

from mmau.action_units import AU_NAMES
from mmau.synthetic import (
    SyntheticConfig,
    read_truth,
    render_clip,
    render_dataset,
    write_movie,
    writer,
)
from mmau.synthetic.warp import load_faces

SIZE = SyntheticConfig(num_frames=40, size=64)
SMALL = {"num_train": 2, "num_validation": 1, "seed": 3, "config": SIZE}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    assert render_dataset(folder, **SMALL) == folder
    return folder


def decode(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    with av.open(str(path)) as container:
        sound = list(container.decode(audio=0))
    images = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    times = np.array([frame.time for frame in frames])
    waveform = np.concatenate([block.to_ndarray()[0] for block in sound])
    return images, times, waveform, sound[0].time, sound[0].sample_rate


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_layout_is_that_of_aff_wild2_and_nothing_else_is_left(root):
    assert files(root) == [
        "AU_Detection_Challenge/Train_Set/train_0000.txt",
        "AU_Detection_Challenge/Train_Set/train_0001.txt",
        "AU_Detection_Challenge/Validation_Set/validation_0000.txt",
        "README.txt",
        "truth.json",
        "videos/train_0000.mp4",
        "videos/train_0001.mp4",
        "videos/validation_0000.mp4",
    ]


def test_annotations_have_the_header_and_one_row_per_decoded_frame(root):
    truth = read_truth(root)
    for path in root.glob("AU_Detection_Challenge/*/*.txt"):
        header, *rows = path.read_text().splitlines()
        assert header == ",".join(AU_NAMES)
        labels = np.array([[int(v) for v in row.split(",")] for row in rows])
        np.testing.assert_array_equal(labels, truth[path.stem].labels)
        assert len(decode(root / "videos" / f"{path.stem}.mp4")[0]) == len(rows) == 40


def test_a_decoded_file_is_the_rendered_clip(root):
    plan = read_truth(root)["train_0001"]
    clip = render_clip(plan.seed, SIZE, photograph=plan.photograph)
    images, times, waveform, start, rate = decode(root / "videos" / "train_0001.mp4")
    assert np.abs(images.astype(float) - clip.frames).mean() < 6  # lossy, 4:2:0 colours
    np.testing.assert_allclose(times, clip.timestamps, atol=1e-6)
    assert (start, rate) == (0, 44_100)
    # The sound starts with the first frame: the best lag of the cross-correlation is none at all.
    size = 2 ** int(np.ceil(np.log2(len(waveform) + len(clip.waveform))))
    product = np.fft.rfft(waveform, size) * np.conj(np.fft.rfft(clip.waveform, size))
    assert np.fft.irfft(product).argmax() in (0, 1, size - 1)
    np.testing.assert_array_equal(plan.hidden, clip.hidden)
    assert plan.events == clip.events


def test_a_sound_precedes_its_episode_by_the_lead_in_the_decoded_file(tmp_path):
    config = SyntheticConfig(
        num_frames=60, size=64, lead=(0.5, 0.5), silent=0, distractors=0, hidden=(0, 0), faint=0,
        background_noise=1e-4,
    )  # fmt: skip
    clip = render_clip(4, config)
    path = write_movie(
        tmp_path / "clip.mp4", clip.frames, fps=15.0, waveform=clip.waveform, sample_rate=44_100
    )
    _, times, waveform, start, rate = decode(path)
    sounded = start + np.flatnonzero(np.abs(waveform) > 0.02)[0] / rate
    moved = times[np.flatnonzero(clip.intensities.any(1))[0]]
    assert clip.events[0].onset - clip.events[0].sound_time == pytest.approx(0.5)
    # A movement is seen in the first frame after its onset; a gasp swells for about 0.1 s.
    assert 0.35 < moved - sounded < 0.5 + 1 / 15 + 0.01


def test_the_truth_says_who_made_the_photographs_and_how_to_render_again(root):
    document = json.loads((root / "truth.json").read_text())
    assert document["settings"]["seed"] == 3
    assert document["settings"]["config"]["silent"] == 0.15
    for info in document["photographs"].values():
        assert info["credit"]
        assert "Public domain" in info["licence"]
    readme = (root / "README.txt").read_text()
    assert "What they are not" in readme
    assert "NASA" in readme
    assert "James S. Davis" in readme
    assert {plan.photograph for plan in read_truth(root).values()} == {"grace_hopper", "astronaut"}


def test_a_second_call_renders_nothing_and_one_missing_file_only_itself(root, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "load_faces", lambda: pytest.fail("nothing to render"))
        render_dataset(root, **SMALL, progress=lambda *a: calls.append(a))
    assert calls == [(3, 3)]
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == before
    lost = root / "videos" / "train_0000.mp4"
    content = lost.read_bytes()
    lost.unlink()
    calls.clear()
    render_dataset(root, **SMALL, progress=lambda *a: calls.append(a))
    assert calls == [(2, 3), (3, 3)]
    assert lost.read_bytes() == content


def test_two_processes_write_the_same_files(root, tmp_path):
    calls = []
    render_dataset(tmp_path, **SMALL, jobs=2, progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert files(tmp_path) == files(root)
    for name in files(root):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), name


def test_a_failure_leaves_no_half_file_and_the_next_call_resumes(tmp_path, monkeypatch):
    real = writer.write_movie
    seen = []

    def fail_on_second(path, *args, **options):
        seen.append(path)
        if len(seen) == 2:
            raise OSError("disk full")
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_movie", fail_on_second)
        with pytest.raises(OSError, match="disk full"):
            render_dataset(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.rglob("*.mp4")] == ["train_0000.mp4"]
    with pytest.raises(FileNotFoundError, match=re.escape("no truth.json in")):
        read_truth(tmp_path)
    calls = []
    render_dataset(tmp_path, **SMALL, progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert read_truth(tmp_path)


def test_a_folder_with_other_content_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match=re.escape("with other settings (seed); choose another")):
        render_dataset(root, **{**SMALL, "seed": 4})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files that are not synthetic data"):
        render_dataset(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="`root` must be a folder"):
        render_dataset(tmp_path / "thesis.tex", **SMALL)
    assert files(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "`jobs` must be in [1, inf); got 0."),
        ({"num_train": -1}, "`num_train` must be in [0, inf); got -1."),
        ({"num_validation": -1}, "`num_validation` must be in [0, inf); got -1."),
        ({"seed": -1}, "`seed` must be in [0, inf); got -1."),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        render_dataset(tmp_path / "new", **{**SMALL, **options})
    assert not (tmp_path / "new").exists()


def test_a_video_without_sound_has_no_sound_track(tmp_path):
    frames = np.zeros((3, 32, 48, 3), dtype=np.uint8)
    path = write_movie(tmp_path / "deep" / "a.mp4", frames, fps=12.5)
    with av.open(str(path)) as container:
        assert not container.streams.audio
        assert [float(f.time) for f in container.decode(video=0)] == pytest.approx([0, 0.08, 0.16])


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (np.zeros((2, 8, 8, 3)), {}, "must be uint8 of shape (t, h, w, 3); got float64"),
        (np.zeros((2, 9, 8, 3), np.uint8), {}, "even height and width for H.264; got (9, 8)"),
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            {"waveform": np.zeros((1, 9))},
            "shape (n,); got (1, 9)",
        ),
        (np.zeros((2, 8, 8, 3), np.uint8), {"crf": 60}, "`crf` must be in [0, 51]; got 60."),
        (np.zeros((2, 8, 8, 3), np.uint8), {"fps": 0}, "`fps` must be in (0, inf); got 0."),
    ],
)
def test_bad_videos_are_refused(tmp_path, frames, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_movie(tmp_path / "a.mp4", frames, **{"fps": 15.0, **options})
    assert not list(tmp_path.iterdir())


def test_faces_are_small_enough_to_send_to_a_worker():
    assert sum(face.image.nbytes + face.mesh.nbytes for face in load_faces()) < 3e6
