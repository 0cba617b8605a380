"""File, frames, trial and one pass over everything agree; what is missing is noted."""

import numpy as np
import pytest
import torch

from mmau.data.prepare import prepare_video
from mmau.evaluation import Calibration
from mmau.functional import asymmetric_posterior
from mmau.inference import AUPredictor, StageTimes
from mmau.media import FaceOptions, MediaError, read_audio
from mmau.media.video import VideoReader

NAMES = ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26")
EVERY_FACE = FaceOptions(face="all")


@pytest.fixture(scope="module")
def trial(film):
    return prepare_video(film, crop_size=64)


@pytest.fixture(scope="module")
def predictor(small_detector):
    return AUPredictor(small_detector(), crop_size=64)


@pytest.fixture(scope="module")
def one_pass(predictor, trial):
    """The detector's own `forward` over the whole trial at once."""
    images = torch.from_numpy(trial.crops).movedim(-1, 1).float()[None] / 255
    with torch.no_grad():
        return predictor.detector(
            images,
            torch.from_numpy(trial.landmarks)[None],
            torch.from_numpy(trial.valid)[None],
            torch.from_numpy(trial.waveform)[None],
            torch.from_numpy(trial.timestamps - trial.audio_start)[None],
        )[0]


@pytest.fixture
def small_chunks(monkeypatch):
    """The film is short: cut it finely, so that state and sound are carried over."""
    monkeypatch.setattr("mmau.inference.predictor.FRAMES_PER_CHUNK", 7)


def test_a_file_in_chunks_is_one_pass(predictor, one_pass, film, small_chunks):
    stages = StageTimes()
    seen = []
    (scored,) = predictor.score_file(
        film, stages=stages, progress=lambda *counts: seen.append(counts)
    )
    torch.testing.assert_close(scored.logits, one_pass, rtol=1e-4, atol=1e-5)
    assert seen == [(i, 40) for i in range(1, 41)]
    assert stages.num_frames == 40
    assert all(seconds > 0 for seconds in stages.seconds.values())
    assert "detect" in stages.render()


def test_the_table_says_what_the_logits_say(predictor, one_pass, film, trial):
    table = predictor.predict_file(film)
    np.testing.assert_allclose(table.probability, one_pass.sigmoid(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(table.active, table.probability >= 0.5)
    np.testing.assert_array_equal(table.timestamps, trial.timestamps)
    np.testing.assert_array_equal(table.valid, trial.valid)
    assert table.frames.tolist() == list(range(1, 41))
    assert table.notes == (f"no face in {int((~trial.valid).sum())} of 40 frames (valid = 0)",)
    assert table.landmarks is None


def test_a_prepared_trial_gives_the_same(predictor, one_pass, trial):
    table = predictor.predict_trial(trial)
    np.testing.assert_allclose(table.probability, one_pass.sigmoid(), rtol=1e-4, atol=1e-5)


def test_frames_from_anywhere_give_the_same(predictor, one_pass, film, small_chunks):
    sound = read_audio(film)
    with VideoReader(film) as reader:
        table = predictor.predict_frames(
            ((frame.image, frame.time) for frame in reader),
            sound=np.array_split(sound.waveform, 11),
            sound_start=sound.start_time,
        )
    np.testing.assert_allclose(table.probability, one_pass.sigmoid(), rtol=1e-4, atol=1e-5)
    with VideoReader(film) as reader:
        silent = predictor.predict_frames((frame.image, frame.time) for frame in reader)
    assert "no sound track" in silent.notes[0]
    assert np.abs(silent.probability - table.probability).max() > 1e-4


def test_a_model_that_looks_ahead_reads_a_short_film_in_one_pass(small_detector, film, trial):
    predictor = AUPredictor(small_detector(bidirectional=True), crop_size=64)
    np.testing.assert_allclose(
        predictor.predict_file(film).probability,
        predictor.predict_trial(trial).probability,
        rtol=1e-4,
        atol=1e-5,
    )


def test_smoothing_and_posterior_of_the_checkpoint_are_applied(small_detector, trial, one_pass):
    calibration = Calibration(
        NAMES,
        (0.2,) * 12,
        (0.4,) * 12,
        probability="posterior",
        posterior_options={"gamma_pos": 1.0, "gamma_neg": 4.0, "margin": 0.05},
    )
    table = AUPredictor(small_detector(), calibration, crop_size=64).predict_trial(trial)
    meant = asymmetric_posterior(one_pass, gamma_pos=1.0, gamma_neg=4.0, margin=0.05)
    expected = calibration.smooth(meant, torch.from_numpy(trial.timestamps))
    np.testing.assert_allclose(table.probability, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(table.probability - meant.numpy()).max() > 1e-3
    np.testing.assert_array_equal(table.active, calibration.decide(expected))


def test_one_option_per_action_unit(small_detector, trial):
    same = {"gamma_pos": 1.0, "gamma_neg": 4.0, "margin": 0.05}
    each = {name: (value,) * 12 for name, value in same.items()}
    tables = [
        AUPredictor(
            small_detector(),
            Calibration(NAMES, (0.5,) * 12, probability="posterior", posterior_options=options),
            crop_size=64,
        ).predict_trial(trial)
        for options in (same, each)
    ]
    np.testing.assert_allclose(tables[0].probability, tables[1].probability, rtol=1e-5)


def test_each_face_has_rows_while_it_is_there(predictor, film_of_two, small_chunks):
    table = predictor.predict_file(film_of_two, faces=EVERY_FACE, geometry=True)
    left, right = table.rows_of(0), table.rows_of(1)
    assert left.frames.tolist() == list(range(1, 41))
    # The detector looks for newcomers every ten frames.
    assert 21 <= right.frames[0] <= 31
    assert right.frames[-1] == 40
    assert right.valid[0]
    np.testing.assert_allclose(right.timestamps, (right.frames - 1) / 15, atol=1e-3)
    assert np.nanmean(left.boxes[:, 0]) < 192 < np.nanmean(right.boxes[:, 0])
    np.testing.assert_allclose(right.landmarks[0].min(0), right.boxes[0, :2], atol=1e-3)
    # Each person is predicted as if the other were not there.
    alone = predictor.predict_file(film_of_two, faces=FaceOptions(face="left"))
    np.testing.assert_allclose(left.probability, alone.probability, rtol=0.02, atol=0.02)


def test_faces_that_leave_and_no_face(predictor, film, small_chunks):
    """The face leaves for 8 frames, longer than a chunk, and comes back as somebody."""
    table = predictor.predict_file(film, faces=EVERY_FACE)
    assert set(table.frames[table.valid].tolist()) >= {1, 12, 21, 40}
    assert not set(table.frames[table.valid].tolist()) & set(range(14, 20))
    blank = np.full((64, 64, 3), 110, dtype=np.uint8)
    no_face = predictor.predict_frames([(blank, i / 15) for i in range(20)], faces=EVERY_FACE)
    assert no_face.frames.tolist() == list(range(1, 21))
    assert no_face.face_id.tolist() == [0] * 20
    assert not no_face.valid.any()
    assert "no face was found in any frame" in no_face.notes[-1]


def test_a_cut_file_is_noted_or_refused(predictor, clip, tmp_path):
    import av

    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=15)
        stream.height, stream.width = clip[0].shape[1:3]
        stream.options = {"crf": "1"}
        for image in clip[0]:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(0.7 * len(whole))])
    table = predictor.predict_file(path)
    assert len(table) < 40
    assert any("the container announces 40" in note for note in table.notes)
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        predictor.predict_file(path, strict=True)


def test_repeated_times_do_not_stop_the_smoothing(small_detector, trial):
    from dataclasses import replace

    times = trial.timestamps.copy()
    times[5] = times[4]
    calibration = Calibration(NAMES, (0.5,) * 12, (0.4,) * 12)
    predictor = AUPredictor(small_detector(), calibration, crop_size=64)
    table = predictor.predict_trial(replace(trial, timestamps=times))
    np.testing.assert_array_equal(table.timestamps, times)
    expected = predictor.predict_trial(trial)
    assert np.abs(table.probability - expected.probability).mean() < 0.01


def test_wrong_input_is_one_sentence(predictor, small_detector):
    with pytest.raises(MediaError, match=r"no such file: nowhere\.mp4"):
        predictor.predict_file("nowhere.mp4")
    with pytest.raises(ValueError, match="there is not one frame to predict"):
        predictor.predict_frames([])
    black = np.zeros((32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"later than that of the frame before; got 0.0 after 0.0"):
        predictor.predict_frames([(black, 0.0), (black, 0.0)])
    for wrong in (black.astype(float), black[..., 0], black[..., :2], "frame"):
        with pytest.raises(ValueError, match=r"must be a uint8 array \(h, w, 3\)"):
            predictor.predict_frames([(wrong, 0.0)])
    with pytest.raises(ValueError, match="the calibration is for AU1, AU2, but the detector"):
        AUPredictor(small_detector(), Calibration(("AU1", "AU2"), (0.5, 0.5)))
    with pytest.raises(ValueError, match="does not say under which loss"):
        AUPredictor(small_detector(), Calibration(NAMES, (0.5,) * 12, probability="posterior"))
