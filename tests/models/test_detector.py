"""The whole detector: nothing leaks from what is missing, everything that is there counts."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmau.encoders import LogMelEncoder
from mmau.encoders.vision import tiny_dinov2
from mmau.models import AUDetector, Component, DetectorConfig, build_detector
from mmau.modules import HGA, AsymmetricCrossAttention, LandmarkToPatch, VisionMamba

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 32}


def small_config(**changes):
    return DetectorConfig(
        **{
            "visual": Component("tiny", TINY),
            "audio": Component("log_mel", {"num_mels": 16}),
            "temporal": Component("agssm", {"num_layers": 1, "d_inner": 8, "d_state": 4}),
            "d_region": 16,
            "num_heads": 4,
            "d_model": 16,
            "d_audio": 8,
            "crop_size": 32,
            **changes,
        }
    )


VARIANTS = {
    "paper": {},
    "cross attention": {"fusion": "cross_attention"},
    "silent": {"audio": None},
    "global pool": {"alignment": "global_pool"},
    "tcn": {"temporal": Component("tcn", {"num_layers": 1})},
    "transformer": {"temporal": Component("transformer", {"num_layers": 1})},
    "mean": {"merge": "mean"},
    "attention": {"merge": "attention"},
    "tiny wavlm": {"audio": Component("tiny_wavlm")},
}


@pytest.fixture(params=sorted(VARIANTS))
def detector(request):
    return build_detector(small_config(**VARIANTS[request.param])).eval()


def clip(b=2, t=5, seconds=0.5):
    times = torch.arange(t, dtype=torch.float64).expand(b, t) / 15
    return {
        "images": torch.rand(b, t, 3, 32, 32),
        "landmarks": torch.rand(b, t, 68, 2) * 32,
        "valid": torch.tensor([[True, True, False, True, True], [False, True, True, True, False]]),
        "waveform": torch.randn(b, int(16000 * seconds)) * 0.1,
        "frame_times": times,
    }


def inputs_of(detector, batch):
    if detector.audio_encoder is None:
        return {k: v for k, v in batch.items() if k not in ("waveform", "frame_times")}
    return batch


def test_one_row_of_logits_per_frame(detector):
    logits = detector(**inputs_of(detector, clip()))
    assert logits.shape == (2, 5, 12)
    assert logits.isfinite().all()


def test_sound_may_be_absent(detector):
    batch = clip()
    silent = detector(batch["images"], batch["landmarks"], batch["valid"])
    assert silent.shape == (2, 5, 12)
    if detector.audio_encoder is not None:
        assert not torch.allclose(silent, detector(**batch), atol=1e-6)
        nothing = {**batch, "lengths": torch.zeros(2, dtype=torch.long)}
        short = {**batch, "waveform": batch["waveform"][:, :100]}
        assert_close(detector(**nothing), silent)
        assert_close(detector(**short), silent)


def test_what_stands_in_a_frame_without_a_face_does_not_leak(detector):
    """NaN in crop and landmarks, forwards and backwards."""
    batch = inputs_of(detector, clip())
    dirty = {k: v.clone() for k, v in batch.items()}
    dirty["images"][~batch["valid"]] = torch.nan
    dirty["landmarks"][~batch["valid"]] = torch.nan
    assert torch.equal(detector(**dirty), detector(**batch))
    detector(**dirty).square().sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_every_trainable_tensor_learns():
    detector = build_detector(small_config(fusion="cross_attention", merge="attention"))
    for _ in range(2):  # what starts at zero hides the gradient of what multiplies it
        logits = detector(**clip())
        detector.zero_grad()
        (logits * torch.randn_like(logits)).sum().backward()
        with torch.no_grad():
            for parameter in detector.parameters():
                if parameter.grad is not None:
                    parameter += 0.05 * torch.randn_like(parameter)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-12, name
        else:
            assert parameter.grad is None, name


def test_a_clip_without_any_face_still_runs_and_gives_zero_gradients():
    """Zero rather than none: distributed training waits for every parameter."""
    detector = build_detector(small_config()).train()
    batch = clip()
    batch["valid"] = torch.zeros_like(batch["valid"])
    batch["images"][:] = torch.nan
    batch["landmarks"][:] = torch.nan
    logits = detector(**batch)
    assert logits.isfinite().all()
    logits.sum().backward()
    for name, parameter in detector.visual_encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    assert detector.no_face.grad.abs().max() > 0


def test_a_missing_face_is_one_learned_vector():
    detector = build_detector(small_config())
    tokens = torch.randn(1, 3, detector.num_regions, 16)
    visual = detector.eval().merge_regions(tokens, torch.tensor([[True, False, False]]))
    assert torch.equal(visual[0, 1], detector.no_face)
    assert torch.equal(visual[0, 2], detector.no_face)
    assert not torch.equal(visual[0, 0], detector.no_face)


def test_tokens_of_a_frame_without_a_face_do_not_leak_either(detector):
    """Cached tokens, as the inference uses them: NaN there reaches no gradient."""
    tokens = torch.randn(1, 3, detector.num_regions, 16)
    valid = torch.tensor([[True, False, True]])
    clean = detector.merge_regions(tokens, valid)
    tokens[0, 1] = torch.nan
    dirty = detector.merge_regions(tokens, valid)
    assert torch.equal(dirty, clean)
    dirty.square().sum().backward()
    for module in (detector.region_norm, detector.merge):
        for name, parameter in module.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_frames_one_by_one_are_the_frames_together(detector):
    batch = clip()
    images, landmarks = batch["images"][0], batch["landmarks"][0]
    landmarks[3] = torch.nan
    whole = detector.encode_frames(images, landmarks)
    assert whole.shape[:2] == (5, detector.num_regions)
    chunked = detector.encode_frames(images, landmarks, frames_per_chunk=2)
    assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    assert whole.isfinite().all()


def test_a_landmark_that_is_not_visible_is_one_that_is_not_known():
    detector = build_detector(small_config()).eval()
    images, landmarks = torch.rand(2, 3, 32, 32), torch.rand(2, 68, 2) * 32
    visible = torch.rand(2, 68) < 0.5
    hidden = detector.encode_frames(images, landmarks, visible)
    unknown = landmarks.masked_fill(~visible[..., None], torch.nan)
    assert torch.equal(detector.encode_frames(images, unknown), hidden)
    assert not torch.allclose(detector.encode_frames(images, landmarks), hidden)


def test_recomputed_activations_give_the_same_gradients():
    plain = build_detector(small_config(audio=None)).eval()
    frugal = copy.deepcopy(plain)
    frugal.frames_per_chunk, frugal.checkpoint_frames = 2, True
    batch = inputs_of(plain, clip())
    plain(**batch).square().sum().backward()
    frugal(**batch).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if a.grad is not None:
            assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_state_carries_a_video_over_a_cut():
    detector = build_detector(small_config()).eval()
    visual, audio = torch.randn(1, 9, 16), torch.randn(1, 9, 8)
    mask = torch.tensor([[True, False, True, True, True, False, True, True, True]])
    whole, _ = detector.classify(visual, audio, audio_mask=mask)
    first, state = detector.classify(visual[:, :4], audio[:, :4], audio_mask=mask[:, :4])
    second, _ = detector.classify(visual[:, 4:], audio[:, 4:], audio_mask=mask[:, 4:], state=state)
    assert_close(torch.cat([first, second], 1), whole)
    dirty = audio.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(detector.classify(visual, dirty, audio_mask=mask)[0], whole)


def test_sound_reaches_the_frame_at_its_time():
    """The times of the frames, not their number: the same frames later get the later sound."""
    detector = build_detector(small_config()).eval()
    waveform = torch.zeros(1, 32000)
    waveform[:, 16000:] = torch.randn(16000) * 0.3
    encoded = detector.encode_audio(waveform)
    visual = torch.zeros(1, 2, 16)
    frames = torch.tensor([[0.5, 1.5]], dtype=torch.float64)
    audio, mask = detector.align_audio(visual, *encoded[:2], frames, encoded.mask)
    early, _ = detector.align_audio(visual, *encoded[:2], frames - 0.4, encoded.mask)
    assert mask.all()
    assert_close(audio[0, 0], early[0, 0])
    assert not torch.allclose(audio[0, 1], early[0, 0], atol=1e-2)
    _, after = detector.align_audio(visual, *encoded[:2], frames + 0.6, encoded.mask)
    assert after.tolist() == [[True, False]]


def test_the_head_starts_at_the_prior():
    detector = build_detector(small_config())
    nn.init.zeros_(detector.head.weight)
    assert_close(detector(**clip()).sigmoid(), torch.full((2, 5, 12), 0.15))


def parts(**changes):
    visual = tiny_dinov2(**TINY)
    return {
        "visual_encoder": visual,
        "landmark_to_patch": LandmarkToPatch(),
        "hga": HGA(16, 16, 4),
        "temporal": VisionMamba(16),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hga": None}, "`hga` and `landmark_to_patch` belong together"),
        ({"audio_encoder": LogMelEncoder()}, "`audio_encoder` and the `d_audio` of the temporal"),
        ({"temporal": VisionMamba(16, 8)}, "`audio_encoder` and the `d_audio` of the temporal"),
        (
            {"audio_cross_attention": AsymmetricCrossAttention(16, 8, 2)},
            "`audio_cross_attention` needs an `audio_encoder`",
        ),
        ({"dropout": 1.0}, "`dropout` must be in"),
        ({"frames_per_chunk": 0}, "`frames_per_chunk` must be in"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        AUDetector(**parts(**changes))


def test_a_detector_of_bare_parts_works_without_a_merge():
    detector = AUDetector(
        visual_encoder=tiny_dinov2(**TINY),
        temporal=VisionMamba(16, d_inner=8),
        au_names=("AU1", "AU2"),
    )
    batch = clip()
    assert detector(batch["images"], None, batch["valid"]).shape == (2, 5, 2)
    assert "AU1, AU2" in repr(detector)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"valid": torch.ones(2, 5)}, TypeError, "`valid` must be a bool tensor"),
        ({"valid": torch.ones(2, 4).bool()}, ValueError, "axis `t` is 5 in `images` but 4"),
        ({"landmarks": None}, ValueError, "`landmarks` are needed to find the regions"),
        ({"landmarks": torch.zeros(2, 5, 68, 3)}, ValueError, r"`landmarks` must have shape"),
        ({"frame_times": None}, ValueError, "`frame_times` are needed to align"),
        ({"waveform": torch.zeros(3, 800)}, ValueError, "axis `b` is 2 in `images` but 3"),
        ({"waveform": torch.full((2, 800), torch.nan)}, ValueError, "NaN or infinite samples"),
        ({"images": torch.zeros(2, 5, 3, 32, 32).byte()}, TypeError, "divide uint8 by 255"),
    ],
)
def test_wrong_input(changes, error, message):
    with pytest.raises(error, match=message):
        build_detector(small_config())(**{**clip(), **changes})


def test_sound_for_a_detector_without_is_an_error():
    detector = build_detector(small_config(audio=None))
    message = "built without an audio encoder"
    with pytest.raises(ValueError, match=message):
        detector(**clip())
    with pytest.raises(ValueError, match=message):
        detector.classify(torch.zeros(1, 2, 16), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match=message):
        detector.align_audio(*[torch.zeros(1, 2, 16)] * 4)
