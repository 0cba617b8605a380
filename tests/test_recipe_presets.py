"""Presets hold the paper's settings, rows of Table 1 differ in one thing, and all of them run."""

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmau.synthetic import SyntheticConfig

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module", autouse=True)
def _recipes_can_be_imported():
    pytest.importorskip("accelerate")
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path.remove(str(RECIPES))


@pytest.fixture
def presets():
    import affwild2_presets

    return affwild2_presets


def test_the_paper_preset_holds_section_4_1(presets):
    """By the numbers of the paper, one by one."""
    config = presets.PAPER
    model, optim = config.model, config.optim
    assert model.visual.options["name"] == "facebook/dinov2-large"
    assert model.visual.options["lora_rank"] > 0
    assert model.audio.options["name"] == "microsoft/wavlm-large"
    assert (model.crop_size, model.d_region, model.num_heads) == (224, 768, 8)
    assert (model.alignment, model.temporal.name, config.loss.name) == ("hga", "agssm", "asl")
    assert model.fusion == "cross_attention"
    assert (optim.lr, optim.lr_adapters, optim.weight_decay) == (2e-4, 1e-5, 1e-4)
    assert (optim.warmup_epochs, optim.batch_clips, config.data.clip_frames) == (5.0, 16, 256)
    assert optim.swa_epochs > 0
    assert optim.patience is None
    assert config.states.keep_when_done


def test_full_is_the_paper(presets):
    full, paper = presets.PRESETS["full"][1], presets.PRESETS["paper"][1]
    assert dataclasses.replace(full, out=paper.out) == paper


@pytest.mark.parametrize("size", ["at_paper_size", "at_demo_size"])
def test_each_row_adds_one_thing(presets, size):
    rows = [getattr(presets, size)(row) for row in presets.ROWS.values()]
    parts = [
        {
            "encoders": (c.model.visual, c.model.audio, c.frame_stage),
            "alignment": (c.model.alignment, c.model.fusion),
            "temporal": c.model.temporal,
            "loss": c.loss,
        }
        for c in rows
    ]
    changed = [[k for k in now if now[k] != before[k]] for before, now in pairwise(parts)]
    assert changed == [["encoders"], ["alignment"], ["temporal"], ["loss"], ["loss"]]
    same = {"visual", "audio", "alignment", "fusion", "temporal"}
    rest = {
        str({k: v for k, v in dataclasses.asdict(c.model).items() if k not in same}) for c in rows
    }
    assert len(rest) == 1
    assert len({str(c.optim) + str(c.data) for c in rows}) == 1


def test_every_row_builds_at_demo_size(presets):
    from mmau.models import build_detector
    from mmau.modules import LOSSES

    for row in presets.ROWS.values():
        config = presets.at_demo_size(row)
        detector = build_detector(config.model)
        assert (detector.hga is None) == (row.alignment == "global_pool")
        LOSSES.create(config.loss.name, **config.loss.options)


def test_problems_are_found_before_any_work(presets, tmp_path):
    problems_of = presets.problems_of

    def problems(config, num_ranks=1):
        config = dataclasses.replace(config, out=tmp_path)
        return "\n".join(problems_of(config, {}, num_ranks))

    def with_optim(**changes):
        return dataclasses.replace(
            presets.DEMO, optim=dataclasses.replace(presets.DEMO.optim, **changes)
        )

    assert problems(presets.DEMO) == ""
    assert "give the data: --data.root DIR" in problems(presets.PAPER)
    assert "fp16 needs a GPU" in problems(with_optim(precision="fp16"))
    assert "--optim.swa-epochs must not exceed" in problems(with_optim(swa_epochs=99))
    assert "--optim.swa-lr must be 0 to --optim.lr" in problems(with_optim(swa_lr=1.0))
    assert "it needs --optim.validate-every" in problems(with_optim(patience=2, validate_every=0))
    assert "cannot be shared by 17 processes" in problems(presets.DEMO, 17)
    both = dataclasses.replace(presets.DEMO.data, drop_sound=0.6, drop_face=0.6, flip=0.5)
    said = problems(dataclasses.replace(presets.DEMO, data=both))
    assert "must not exceed 1 together" in said
    assert "--data.flip mirrors images, but a frame stage caches" in said


def test_as_many_processes_as_clips_may_share_them_and_no_more(presets, monkeypatch):
    import affwild2_au

    monkeypatch.setattr(affwild2_au, "TrainingClips", lambda *given: range(3))

    def start(num_processes):
        accelerator = SimpleNamespace(num_processes=num_processes)
        # No detector: an AttributeError comes from behind the check.
        affwild2_au.train_detector("", None, {"train": []}, {}, presets.SMOKE, accelerator)

    with pytest.raises(AttributeError, match="'NoneType'"):
        start(3)
    with pytest.raises(SystemExit, match="4 processes cannot share 3 training clips"):
        start(4)


def test_a_data_root_with_holes_is_described(presets, tmp_path):
    problems_of = presets.problems_of

    labels = tmp_path / "AU_Detection_Challenge"
    for folder in (tmp_path / "videos", labels / "Train_Set", labels / "Validation_Set"):
        folder.mkdir(parents=True)
    (labels / "Train_Set" / "nobody.txt").write_text("AU1,AU2\n0,1\n")
    data = dataclasses.replace(presets.PAPER.data, root=tmp_path)
    said = "\n".join(problems_of(dataclasses.replace(presets.PAPER, data=data), {}))
    assert "nobody" in said


def test_the_ablation_runs_every_row_and_keeps_what_is_finished(presets, tmp_path, monkeypatch):
    import affwild2_ablation
    from affwild2_ablation import SETTINGS, AblationConfig

    table = SETTINGS["table1"]
    extra = SETTINGS["occlusion"].variants["pool"], SETTINGS["memory"].variants["reset"]
    variants = {
        **table.variants,
        "pool": dataclasses.replace(extra[0], baseline="fm"),
        "reset": dataclasses.replace(extra[1], window=1.0),
    }
    render = dataclasses.replace(table.render, clip=SyntheticConfig(num_frames=32))
    small = dataclasses.replace(table, variants=variants, render=render, clip_frames=32)
    monkeypatch.setitem(SETTINGS, "table1", small)
    config = AblationConfig(settings=("table1",), seeds=1, jobs=1, scale=0.01, out=tmp_path)
    record = affwild2_ablation.run(config)
    assert set(record["table1"]) == set(variants)
    for line in record["table1"].values():
        assert line["parameters"] > 1000
        assert 0 <= line["mean_f1"]["raw at 0.5, all"]["estimate"] <= 1
        assert ("raw at 0.5, all" in line["delta_f1"]) == (line["baseline"] is not None)
    text = (tmp_path / "ablation.md").read_text()
    assert "### table1" in text
    assert all(variant.title in text for variant in variants.values())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("table1/seed-0/*.pt")}
    assert len(before) == len(variants)
    assert affwild2_ablation.run(config) == record
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_window_resets_the_temporal_state(presets):
    import torch
    from affwild2_data import ClipModel

    from mmau.models import build_detector

    detector = build_detector(presets.SMOKE.model).eval()

    def clip(tokens):
        num_frames = tokens.shape[1]
        return {
            "tokens": tokens,
            "valid": torch.ones(1, num_frames, dtype=torch.bool),
            "mask": torch.ones(1, num_frames, dtype=torch.bool),
            "waveform": torch.zeros(1, 0),
        }

    tokens = torch.randn(1, 12, detector.num_regions, detector.d_region)
    with torch.no_grad():
        whole = ClipModel(detector)(clip(tokens))
        reset = ClipModel(detector, window=5)(clip(tokens))
        second = ClipModel(detector)(clip(tokens[:, 5:10]))
    torch.testing.assert_close(reset[:, :5], whole[:, :5])
    torch.testing.assert_close(reset[:, 5:10], second)
    assert not torch.allclose(reset[:, 5:], whole[:, 5:], atol=1e-4)
