"""What is saved comes back; what is not a checkpoint is refused with a clear message."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmau.encoders.speech import tiny_wavlm
from mmau.encoders.vision import tiny_dinov2
from mmau.models import (
    Component,
    DetectorConfig,
    build_detector,
    load_pretrained,
    read_record,
    save_pretrained,
)

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 32}


def small_config(**changes):
    return DetectorConfig(
        **{
            "visual": Component("tiny", TINY),
            "audio": Component("log_mel", {"num_mels": 16}),
            "d_region": 16,
            "num_heads": 4,
            "d_model": 16,
            "d_audio": 8,
            "crop_size": 32,
            "au_names": ("AU1", "AU12"),
            **changes,
        }
    )


@pytest.fixture
def saved(tmp_path):
    detector = build_detector(small_config()).eval()
    folder = save_pretrained(
        detector, tmp_path / "run", provenance={"data": "synthetic"}, licence="MIT"
    )
    return detector, folder


def predict(detector):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 3, 32, 32, generator=generator)
    landmarks = 32 * torch.rand(1, 3, 68, 2, generator=generator)
    waveform = torch.randn(1, 6000, generator=generator) * 0.1
    times = torch.arange(3, dtype=torch.float64)[None] / 15
    with torch.no_grad():
        return detector(images, landmarks, torch.ones(1, 3, dtype=torch.bool), waveform, times)


def shake(detector):
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return detector


def test_save_and_load_give_the_same_logits(saved):
    detector, folder = saved
    torch.manual_seed(7)
    loaded, config = load_pretrained(folder)
    assert torch.equal(predict(loaded), predict(detector))
    assert config == detector.config
    assert not loaded.training
    assert loaded.au_names == ("AU1", "AU12")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_checkpoint_with_the_former_name_of_the_cross_attention_loads(tmp_path):
    detector = shake(build_detector(small_config(fusion="cross_attention")).eval())
    folder = save_pretrained(detector, tmp_path / "run")

    def rename(weights):
        new = [name for name in weights if name.startswith("audio_cross_attention.")]
        assert new
        for name in new:
            weights["audio_query." + name.partition(".")[2]] = weights.pop(name)

    change_weights(folder, rename)
    assert torch.equal(predict(load_pretrained(folder).detector), predict(detector))


def test_the_record_says_what_it_is(saved):
    record = read_record(saved[1])
    assert record.au_names == ("AU1", "AU12")
    assert record.licence == "MIT"
    assert record.provenance == {"data": "synthetic"}
    assert record.preprocessing["crop_size"] == 32
    assert record.preprocessing["sample_rate"] == 16000
    assert {"mmau", "torch"} <= set(record.versions)
    assert record.base_weights == {}


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}])
def test_frozen_base_weights_are_fetched_again_and_not_saved(options, tmp_path):
    tiny_dinov2(**TINY).backbone.save_pretrained(tmp_path / "dino")
    tiny_wavlm(num_layers=1).backbone.save_pretrained(tmp_path / "wavlm")
    dino, wavlm = ({"name": str(tmp_path / name), **options} for name in ("dino", "wavlm"))
    config = small_config(
        visual=Component("dinov2", {**dino, "lora_rank": 2}),
        audio=Component("wavlm", {**wavlm, "d_bottleneck": 4}),
    )
    detector = shake(build_detector(config).eval())
    folder = save_pretrained(detector, tmp_path / "run")
    names = set(load_file(folder / "model.safetensors"))
    assert not any("backbone" in name for name in names)
    assert "visual_encoder.lora.0.query.down" in names
    assert "audio_encoder.adapters.0.up.weight" in names
    assert read_record(folder).base_weights["visual_encoder"]["name"] == str(tmp_path / "dino")
    assert torch.equal(predict(load_pretrained(folder).detector), predict(detector))


def test_random_base_weights_are_saved(tmp_path):
    config = small_config(visual=Component("tiny", {**TINY, "lora_rank": 2}))
    detector = shake(build_detector(config).eval())
    folder = save_pretrained(detector, tmp_path / "run")
    assert torch.equal(predict(load_pretrained(folder).detector), predict(detector))


def test_an_older_checkpoint_is_replaced_and_nothing_else(saved, tmp_path):
    detector, folder = saved
    (folder / "calibration.json").write_text("{}")
    save_pretrained(detector, folder)
    assert not (folder / "calibration.json").exists()  # it belonged to the older weights
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_text("dear to me")
    with pytest.raises(ValueError, match="holds something that is not a checkpoint"):
        save_pretrained(detector, other)
    assert (other / "a.jpg").read_text() == "dear to me"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        save_pretrained(detector, tmp_path / "file")


def test_nothing_is_left_behind_when_saving_fails(saved, tmp_path):
    detector, _ = saved
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_pretrained(detector, tmp_path / "new", provenance={"data": object()})
    with torch.no_grad():
        detector.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'head.weight' holds NaN .* nothing was written"):
        save_pretrained(detector, tmp_path / "new")
    detector.config = None
    with pytest.raises(ValueError, match="`config` is needed"):
        save_pretrained(detector, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it holds no config.json"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "clip.mp4").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a checkpoint folder"):
        load_pretrained(tmp_path / "clip.mp4")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_pickles_are_refused_unread(saved, tmp_path):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle, which can run code"):
        load_pretrained(folder)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"model.pt is a pickle, which can run code"):
        load_pretrained(tmp_path / "model.pt")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        load_pretrained(folder)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), r"model.safetensors lacks head.bias\."),
        (lambda w: w.update(extra=torch.zeros(1)), r"weights that the detector .*: extra\."),
        (
            lambda w: w.update({"head.bias": torch.zeros(12)}),
            r"'head.bias' has shape \(12,\) in .* but \(2,\) in the detector",
        ),
        (
            lambda w: [w.pop(n) for n in list(w) if n.startswith("visual_encoder")],
            "lacks .* and [0-9]+ more",
        ),
    ],
)
def test_weights_that_do_not_fit_exactly(saved, change, message):
    change_weights(saved[1], change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved[1])


def change_record(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="other"), "does not describe a detector of mmau"),
        (
            lambda r: r.update(format_version=2),
            "has format version 2; this version of mmau reads 1",
        ),
        (lambda r: r.pop("detector"), "is damaged: 'detector'"),
        (lambda r: r["detector"].update(d_modl=3), "is damaged: unknown key 'd_modl'"),
        (lambda r: r["detector"].update(d_model=32), "the checkpoint is of another size"),
    ],
)
def test_a_record_that_does_not_fit(saved, change, message):
    change_record(saved[1], change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved[1])


def test_damaged_files(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_pretrained(folder)
