"""A card says what the folder says; nothing goes to the hub without provenance and licence."""

import sys
import types
from pathlib import Path

import pytest

from mmau.evaluation import Calibration
from mmau.models import (
    Component,
    DetectorConfig,
    build_detector,
    load_pretrained,
    model_card,
    push_to_hub,
    save_pretrained,
)
from mmau.registry import MissingDependencyError

CONFIG = DetectorConfig(
    visual=Component("tiny", {"hidden_size": 16, "num_layers": 1, "image_size": 32}),
    audio=None,
    d_region=16,
    num_heads=4,
    d_model=16,
    crop_size=32,
    au_names=("AU1", "AU12"),
)


@pytest.fixture(scope="module")
def detector():
    return build_detector(CONFIG)


@pytest.fixture
def folder(detector, tmp_path):
    return save_pretrained(
        detector,
        tmp_path / "run",
        provenance={"data": "rendered clips", "num_videos": {"train": 4, "validation": 3}},
        licence="mit",
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it is asked for and keeps what it gets."""
    calls, kept = [], {}

    class HfApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
            files = (p for p in Path(folder_path).iterdir())
            kept.update({p.name: p.read_bytes() for p in files})
            calls.append(("upload", repo_id, allow_patterns, options["revision"]))
            return f"hub/{repo_id}"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    return calls, kept


def test_the_card_has_the_facts_and_no_others(folder):
    text = model_card(folder, metrics={"mean F1, rendered clips": 0.65712})
    for fact in (
        "license: mit",
        "Predicts AU1, AU12",
        "- data: rendered clips",
        "- num videos: train 4, validation 3",
        "- visual encoder: tiny",
        "- audio encoder: none",
        "- mean F1, rendered clips: 0.6571",
        "counts as active from 0.5",
    ):
        assert fact in text
    bare = model_card(folder)
    assert "Nothing was measured" in bare
    assert "0.6571" not in bare
    Calibration(("AU1", "AU12"), (0.2, 0.4), note="chosen on other clips").save(
        folder / "calibration.json"
    )
    assert "`calibration.json` holds a threshold for each Action Unit; chosen on other clips" in (
        model_card(folder)
    )


def test_a_folder_is_uploaded_with_its_card(folder, hub):
    calls, kept = hub
    assert (
        push_to_hub(folder, "someone/detector", token="t", revision="v1") == "hub/someone/detector"
    )
    assert calls[1] == ("create", "someone/detector", {"private": True, "exist_ok": True})
    assert calls[2][2:] == (["*.safetensors", "*.json", "README.md"], "v1")
    assert set(kept) == {"model.safetensors", "config.json", "README.md"}
    assert kept["README.md"].decode() == model_card(folder)
    load_pretrained(folder)  # the card does no harm


def test_what_was_measured_is_on_the_card_that_is_uploaded(folder, hub):
    calls, kept = hub
    push_to_hub(folder, "someone/detector", metrics={"F1": 0.5})
    assert "- F1: 0.5" in kept["README.md"].decode()
    assert calls[2][:2] == ("upload", "someone/detector")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"licence": "mit"}, "its provenance;"),
        ({"provenance": {"data": "x"}}, "its licence;"),
        ({}, "its provenance and its licence;"),
    ],
)
def test_what_says_nothing_about_itself_is_not_published(detector, hub, tmp_path, given, missing):
    save_pretrained(detector, tmp_path / "run", **given)
    with pytest.raises(ValueError, match=f"does not state {missing}"):
        push_to_hub(tmp_path / "run", "someone/detector")
    assert not hub[0]


def test_without_the_library_it_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"publishing weights needs.*mmau\[encoders\]"):
        push_to_hub(folder, "someone/detector")


def test_no_checkpoint_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model_card(tmp_path / "nowhere")
