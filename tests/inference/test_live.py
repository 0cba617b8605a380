"""One frame in, one row out: the same as a file where the model looks back only."""

import numpy as np
import pytest
import torch

from mmau.evaluation import Calibration
from mmau.inference import AUPredictor, LiveSession, StageTimes
from mmau.inference.stream import LiveSound
from mmau.media import read_audio
from mmau.media.video import VideoReader


@pytest.fixture(scope="module")
def frames(film):
    with VideoReader(film) as reader:
        return [(frame.image, frame.time) for frame in reader]


@pytest.fixture(scope="module")
def sound(film):
    return read_audio(film)


def run_live(predictor, frames, sound, **options):
    """Each step hears what there is up to its frame."""
    rows, heard = [], 0
    with predictor.live(sound_start=sound.start_time, **options) as session:
        for image, time in frames:
            now = max(0, int((time - sound.start_time) * 16000))
            rows.append(session.step(image, time, sound.waveform[heard:now]))
            heard = now
    return rows


@pytest.mark.parametrize("context", [2.0, 0.3])
def test_steps_give_the_table_of_the_file(small_detector, film, frames, sound, context):
    predictor = AUPredictor(small_detector(audio_options={"causal": True}), crop_size=64)
    table = predictor.predict_file(film)
    stages = StageTimes()
    rows = run_live(predictor, frames, sound, sound_context=context, stages=stages)
    np.testing.assert_allclose(
        [row.probability for row in rows], table.probability, rtol=1e-3, atol=1e-4
    )
    assert [row.frame for row in rows] == table.frames.tolist()
    assert [row.timestamp for row in rows] == table.timestamps.tolist()
    assert [row.valid for row in rows] == table.valid.tolist()
    np.testing.assert_allclose([row.confidence for row in rows], table.confidence)
    assert stages.num_frames == 40
    seen = np.array([np.isfinite(row.box).all() for row in rows])
    np.testing.assert_array_equal(seen, table.valid)


def test_an_encoder_that_looks_ahead_differs_only_a_little(small_detector, film, frames, sound):
    predictor = AUPredictor(small_detector(), crop_size=64)
    table = predictor.predict_file(film)
    live = np.array([row.probability for row in run_live(predictor, frames, sound)])
    silent = []
    with predictor.live() as session:
        silent = np.array([session.step(*frame).probability for frame in frames])
    error = np.abs(live - table.probability).mean()
    assert 0 < error < 0.3 * np.abs(silent - table.probability).mean()


def test_causal_smoothing_is_that_of_the_file(small_detector, film, frames):
    detector = small_detector(sound=False)
    names = detector.au_names
    calibration = Calibration(names, (0.4,) * 12, (0.3,) * 12, smoothing_kind="exponential")
    predictor = AUPredictor(detector, calibration, crop_size=64)
    table = predictor.predict_file(film)
    with predictor.live() as session:
        rows = [session.step(*frame) for frame in frames]
    np.testing.assert_allclose(
        [row.probability for row in rows], table.probability, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal([row.active for row in rows], table.active)


def test_what_looks_ahead_is_refused(small_detector):
    detector = small_detector()
    calibration = Calibration(detector.au_names, (0.5,) * 12, (0.25,) * 12)
    predictor = AUPredictor(detector, calibration, crop_size=64)
    with pytest.raises(
        ValueError, match=r"a mean of up to 0\.25 seconds, looks ahead.*pass `smoothing=False`"
    ):
        predictor.live()
    predictor.live(smoothing=False).close()
    with pytest.raises(ValueError, match="VisionMamba, looks ahead, so there is no answer before"):
        AUPredictor(small_detector(bidirectional=True), crop_size=64).live()


def test_a_session_of_its_own_checks_the_calibration_and_switches_training_off(small_detector):
    detector = small_detector().train()
    with pytest.raises(ValueError, match="the calibration is for AU1, AU2, but the detector"):
        LiveSession(detector, Calibration(("AU1", "AU2"), (0.5, 0.5)), crop_size=64)
    LiveSession(detector, Calibration(detector.au_names, (0.5,) * 12), crop_size=64).close()
    assert not detector.training


def test_wrong_use_is_one_sentence(small_detector, frames):
    predictor = AUPredictor(small_detector(), crop_size=64)
    with pytest.raises(TypeError, match="smothing"):
        predictor.live(smothing=False)
    with predictor.live() as session:
        assert session.au_names[0] == "AU1"
        session.step(*frames[1])
        with pytest.raises(ValueError, match="later than that of the frame before"):
            session.step(*frames[0])
        with pytest.raises(ValueError, match=r"`samples` must be mono, of shape \(n,\)"):
            session.step(*frames[2], np.zeros((2, 800), dtype=np.float32))
    with pytest.raises(RuntimeError, match="this session was closed"):
        session.step(*frames[3])


def test_memory_of_the_sound_does_not_grow(small_detector):
    sound = LiveSound(small_detector(), 0.0, 1.0)
    visual = torch.zeros(1, 32)
    for step in range(200):
        sound.add(np.full(1600, 0.1, dtype=np.float32))
        sound.align(visual, np.array([step * 0.1]))
    assert len(sound._waveform) < 1.1 * 16000
    assert len(sound._times) < 100
