"""Every trap of Aff-Wild2 in one data root: what is read must be what was made."""

import numpy as np
import pytest
import torch
from adversarial_root import LEGACY_AU_NAMES, read_code, write_adversarial_root
from torch.utils.data import DataLoader

from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import (
    find_annotations,
    find_frame_folders,
    find_listed_trials,
    find_trials,
    frame_files,
    join_labels,
    listed_frames,
    read_annotation,
    write_submission,
)
from mmau.data.clips import ClipDataset
from mmau.evaluation import AUCounts
from mmau.media.audio import read_audio
from mmau.media.external import AlignedCropFolder
from mmau.media.video import VideoReader

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_adversarial_root(tmp_path_factory.mktemp("adversarial") / "root")


@pytest.fixture(scope="module")
def decoded(truth):
    """Video to what its pixels say and when, read once."""
    found = {}
    for path in {trial.video for trial in truth.trials}:
        with VideoReader(path, num_threads=1) as reader:
            frames = [(read_code(frame.image), frame.time) for frame in reader]
        found[path] = frames
    return found


def by_name(truth, name):
    return next(trial for trial in truth.trials if trial.name == name)


# --------------------------------------------------------------------------------- the root itself
def test_the_root_holds_every_trap(truth):
    """Looked for on disk, without what the generator knows."""
    root = truth.root
    challenge = root / "AU_Detection_Challenge"
    texts = {path.stem: path.read_bytes() for path in challenge.rglob("*.txt")}
    assert any(b"\r\n" in text for text in texts.values())
    assert any(text.split(b"\n")[0].rstrip(b"\r") != text.split(b"\n")[0].strip(b"\r ,\t")
               for text in texts.values())  # fmt: skip
    assert any(text.startswith(b"\xef\xbb\xbf") for text in texts.values())
    assert any(text.startswith(",".join(LEGACY_AU_NAMES).encode()) for text in texts.values())
    assert sum(b"-1,-1" in text for text in texts.values()) > 5
    names = {split: set(find_annotations(root, split)) for split in SPLITS}
    assert {"video10_1_left", "6-30-1920x1080_left"} <= names["train"]
    assert {"video10_1", "6-30-1920x1080_right", "video5_main"} <= names["validation"]
    suffixes = {path.suffix for path in (root / "videos").rglob("*") if path.stem[0] != "."}
    assert {".mp4", ".avi", ".AVI"} <= suffixes
    for junk in (".DS_Store", "._00001.jpg", "old/00001.jpg"):
        assert (root / "cropped_aligned" / "video1" / junk).is_file()
    assert (root / "cropped_aligned_new_50_vids" / "video30" / "00001.jpg").is_file()
    assert not (root / "cropped_aligned" / "video20").exists()
    assert not list((root / "cropped_aligned" / "video21").glob("[0-9]*.jpg"))
    rows_more = {len(t.labels) - t.num_frames for t in truth.trials if t.split != "test"}
    assert {-1, 0, 1} <= rows_more
    gaps = {t.name: set(range(1, t.num_frames + 1)) - set(t.image_numbers) for t in truth.trials}
    assert gaps["2-30-640x360"] == {1, 2, 3}
    assert gaps["video10_1_left"] == {9, 10, 14}
    assert gaps["video10_1"] == {20, 21, 22}


def test_the_same_root_every_time(truth, tmp_path):
    again = write_adversarial_root(tmp_path / "again")
    assert again.submission == truth.submission
    for ours, theirs in zip(truth.trials, again.trials, strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        write_adversarial_root(truth.root)


def test_an_image_without_code_is_not_read():
    with pytest.raises(ValueError, match="carries no code"):
        read_code(np.full((64, 64, 3), 90, np.uint8))


# -------------------------------------------------------------------------------- frames and labels
@pytest.mark.parametrize("split", SPLITS)
def test_every_trial_has_its_video_and_images(truth, split):
    found = find_trials(truth.root, split)
    expected = truth.split(split)
    assert [t.name for t in found] == [t.name for t in expected]
    for ours, true in zip(found, expected, strict=True):
        assert ours.video == true.video, true.trap
        assert ours.frames == true.frames, true.trap
        assert ours.annotation.stem == true.name


@pytest.mark.parametrize("split", SPLITS)
def test_all_frames_of_the_videos_are_joined_right(truth, decoded, split):
    for trial in find_trials(truth.root, split):
        true = by_name(truth, trial.name)
        frames = decoded[trial.video]
        numbers = [number for (_, number), _ in frames]
        assert numbers == list(range(1, true.num_frames + 1)), true.trap
        assert {code for (code, _), _ in frames} == {true.video_code}, true.trap
        np.testing.assert_allclose([t for _, t in frames], true.timestamps, atol=1e-9)
        annotation = read_annotation(trial.annotation)
        assert annotation.au_names == true.au_names
        np.testing.assert_array_equal(annotation.labels, true.labels)
        joined = join_labels(annotation.select(), numbers)
        for row, number in enumerate(numbers):
            assert joined.labels[row].tolist() == [true.label_of(number, au) for au in AU_NAMES]
        assert bool(joined.report) == (len(true.labels) != true.num_frames)


@pytest.mark.parametrize("split", SPLITS)
def test_all_images_are_joined_right(truth, split):
    folders = find_frame_folders(truth.root)
    assert set(folders) == {t.name for t in truth.trials if t.frames is not None}
    for true in truth.split(split):
        if true.frames is None:
            continue
        numbers = list(frame_files(folders[true.name]))
        assert numbers == list(true.image_numbers)
        annotation = read_annotation(find_annotations(truth.root, split)[true.name])
        joined = join_labels(annotation.select(), numbers)
        crops = AlignedCropFolder(true.frames.parent)
        crops.start_video(true.name)
        for number in set(range(1, 30)) - set(numbers):
            assert crops.crop(number - 1) is None
        for number, labels in zip(numbers, joined.labels, strict=True):
            image = crops.crop(number - 1)
            assert image.shape == (112, 112, 3)
            assert read_code(image) == (true.image_code, number)
            assert labels.tolist() == [true.label_of(number, au) for au in AU_NAMES]


def test_the_sound_is_where_it_was_put(truth):
    for true in truth.trials:
        track = read_audio(true.video)
        if true.sound is None:
            assert track is None
            continue
        start, seconds = true.sound
        # AAC comes in blocks of 64 ms at 16 kHz, and begins with one of silence.
        assert abs(track.start_time - start) <= 0.065
        assert abs(track.start_time + track.duration - start - seconds) <= 0.13


@pytest.mark.parametrize("clip_frames", [4, 7, 256])
def test_windows_keep_frame_and_label_together(truth, decoded, clip_frames):
    """Through clips and loader: the pixels' number, the labels' number, the frame id."""
    arrays = {}
    for trial in find_trials(truth.root, "train"):
        frames = decoded[trial.video]
        numbers = np.array([number for (_, number), _ in frames])
        labels = join_labels(read_annotation(trial.annotation).select(), numbers).labels
        arrays[trial.name] = {"pixels": numbers, "labels": labels}
    data = ClipDataset(arrays, clip_frames, stride=max(1, clip_frames // 2))
    found = {name: set() for name in data.lengths}
    for batch in DataLoader(data, batch_size=3, shuffle=True):
        for trial, ids, pixels, labels, mask in zip(
            *(batch[key] for key in ("trial", "frame_ids", "pixels", "labels", "mask")), strict=True
        ):
            true = by_name(truth, trial)
            assert (pixels[mask] == ids[mask] + 1).all()
            assert (labels[~mask] == -1).all()
            for number, row in zip(pixels[mask].tolist(), labels[mask], strict=True):
                assert row.tolist() == [true.label_of(number, au) for au in AU_NAMES]
            found[trial].update(pixels[mask].tolist())
    for name, numbers in found.items():
        assert numbers == set(range(1, by_name(truth, name).num_frames + 1))


# ------------------------------------------------------------------------------ metric, submission
@pytest.mark.parametrize("split", SPLITS)
def test_the_metric_is_that_of_the_truth(truth, decoded, split):
    counts = AUCounts()
    for trial in find_trials(truth.root, split):
        numbers = np.arange(1, len(decoded[trial.video]) + 1)
        joined = join_labels(read_annotation(trial.annotation).select(), numbers)
        decided = torch.from_numpy(by_name(truth, trial.name).decisions).bool()
        counts.update(decided, joined.labels)
    true = truth.counts(split)
    assert {
        name: tuple(row) for name, row in zip(AU_NAMES, counts.counts.tolist(), strict=True)
    } == true
    assert counts.mean_f1() == pytest.approx(truth.mean_f1(split), rel=1e-15)
    assert 0.3 < truth.mean_f1(split) < 0.7


def test_the_submission_is_byte_for_byte_the_expected_one(truth, decoded, tmp_path):
    listed = find_listed_trials(truth.root, truth.example)
    assert {t.name for t in listed} == {t.name for t in truth.split("test")}
    predictions = {}
    for trial in listed:
        true = by_name(truth, trial.name)
        assert (trial.video, trial.frames) == (true.video, true.frames)
        predictions[trial.name] = true.decisions[: len(decoded[trial.video])]
    rows = write_submission(tmp_path / "out.txt", truth.example, predictions, repeat_last=1)
    assert (tmp_path / "out.txt").read_bytes() == truth.submission
    assert rows == len(listed_frames(truth.example)[1]) == sum(len(t.numbers) for t in listed)
    with pytest.raises(
        ValueError, match="no prediction for frame 12 of trial 'video41', which has"
    ):
        write_submission(tmp_path / "strict.txt", truth.example, predictions)
