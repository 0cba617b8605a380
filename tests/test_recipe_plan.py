"""The planner counts what is really kept, and recommends what fits."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmau.models import Component, DetectorConfig, build_detector

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from affwild2_plan import Cost, main, measure_cost, plan_step

sys.path.pop(0)

CONFIG = DetectorConfig(
    visual=Component("tiny", {"lora_rank": 4}),
    audio=Component("log_mel", {"num_mels": 24}),
    d_region=32,
    num_heads=4,
    d_model=64,
    d_audio=32,
    crop_size=64,
)
SMALL = {"clips": 2, "frames": 32, "gpu_memory": 8.0, "dtype": torch.float32}


@pytest.fixture(scope="module")
def plan():
    return plan_step(CONFIG, **SMALL)


def allocated(run):
    """Bytes that a call has allocated and not given back while its graph is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    del kept
    return sum(event.self_cpu_memory_usage for event in seen.events()) * 1.0


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_activations_are_those_that_a_cpu_allocates(lora_rank):
    config = replace(CONFIG, visual=Component("tiny", {"lora_rank": lora_rank}), audio=None)
    predicted = plan_step(config, **SMALL)
    detector = build_detector(config).train()

    def encode(count):
        images = torch.rand(count, 3, 64, 64)
        weights = torch.rand(count, 13, 64)
        return lambda: detector.hga(detector.visual_encoder(images).patch_tokens, weights).tokens

    encode(2)()  # what is allocated once and for all
    per_frame = (allocated(encode(24)) - allocated(encode(8))) / 16
    assert predicted.frame.activations == pytest.approx(per_frame, rel=0.15)

    tokens = torch.rand(2, 32, 13, 32, requires_grad=True)
    valid = torch.ones(2, 32, dtype=torch.bool)

    def classify():
        return detector.classify(detector.merge_regions(tokens, valid))

    classify()
    assert predicted.temporal.activations == pytest.approx(allocated(classify), rel=0.25)


def test_attention_is_counted_as_a_fused_kernel_keeps_it():
    """Queries, keys, values, output and one number per row; not a weight for every pair."""
    heads = torch.empty(1, 4, 100, 16, device="meta", requires_grad=True)
    cost = measure_cost(
        lambda: nn.functional.scaled_dot_product_attention(heads * 1, heads * 2, heads * 3),
        nn.Identity(),
    )
    assert 4 * 4 * 100 * 16 * 4 <= cost.activations <= 4 * 4 * 100 * (4 * 16 + 2)
    assert cost.forward_flops == 2 * 2 * 4 * 100 * 100 * 16


@pytest.mark.parametrize(("learns", "backward"), [(False, 24), (True, 48)])
def test_a_linear_layer_keeps_its_input_and_its_weights_do_not_count(learns, backward):
    layer = nn.Linear(3, 2, device="meta")
    rows = torch.empty(2, 3, device="meta", requires_grad=learns)
    cost = measure_cost(lambda: layer(rows), layer)
    assert cost == Cost(activations=24, forward_flops=24, backward_flops=backward)


def test_costs_grow_with_what_they_are_of(plan):
    longer = plan_step(CONFIG, **{**SMALL, "frames": 64})
    assert longer.frame == plan.frame
    assert longer.temporal.forward_flops == 2 * plan.temporal.forward_flops
    assert longer.flops == pytest.approx(2 * plan.flops, rel=0.05)
    half = plan_step(CONFIG, **{**SMALL, "dtype": torch.bfloat16})
    assert half.frame.activations == pytest.approx(plan.frame.activations / 2, rel=0.1)
    assert plan.seconds_per_step(peak_tflops=2, utilisation=0.5) == plan.flops / 1e12


def test_the_recommendation_fits_and_is_the_fastest_that_does(plan):
    assert (plan.frames_per_chunk, plan.checkpoint_frames, plan.fits) == (None, False, True)
    everything = plan.peak_bytes / 2**30
    tight = plan_step(CONFIG, **{**SMALL, "gpu_memory": 0.8 * everything})
    assert tight.checkpoint_frames
    assert tight.fits
    assert tight.peak_bytes <= 0.9 * 0.8 * everything * 2**30
    larger = replace(tight, frames_per_chunk=2 * tight.frames_per_chunk)
    assert tight.frames_per_chunk == 64 or larger.peak_bytes > 0.9 * 0.8 * everything * 2**30
    assert tight.flops == plan.flops + 64 * plan.frame.forward_flops
    hopeless = plan_step(CONFIG, **{**SMALL, "clips": 64, "frames": 256, "gpu_memory": 0.01})
    assert not hopeless.fits
    assert "does not fit: take fewer clips per step" in str(hopeless)


def test_the_table_says_it_for_people(plan):
    text = str(plan)
    assert "2 clips of 32 frames" in text
    assert "all frames at once" in text
    assert f"{plan.frame.activations / 2**20:.1f} MiB" in text


def test_no_sound_costs_nothing():
    assert plan_step(replace(CONFIG, audio=None), **SMALL).audio == Cost(0, 0, 0)


def test_the_paper_is_counted_without_its_weights():
    """Stated sizes: 24 layers of ViT-L with LoRA on q and v, WavLM-Large with 1 % adapters."""
    config = DetectorConfig(
        visual=Component("dinov2", {"name": "facebook/dinov2-large", "lora_rank": 8}),
        audio=Component("wavlm", {"name": "microsoft/wavlm-large"}),
        fusion="cross_attention",
    )
    plan = plan_step(config, clips=16, frames=256, gpu_memory=80)
    assert 600e6 < plan.parameters < 660e6
    assert 100 < plan.frame.activations / 2**20 < 180
    assert plan.checkpoint_frames
    assert plan.fits
    assert 1.5e15 < plan.flops < 2.5e15


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"frames": 0}, {"fps": 0.0}, {"gpu_memory": 0.0}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        plan_step(CONFIG, **{**SMALL, **wrong})


def test_a_step_is_planned_from_a_preset(capsys):
    main(["smoke", "--gpu-memory", "4", "--train-frames", "1000"])
    text = capsys.readouterr().out
    assert "preset smoke, one of 1 device(s), bf16" in text
    assert "4 clips of 32 frames" in text
    assert "h for an epoch of 8 steps" in text
    with pytest.raises(SystemExit, match="no preset named 'papr'; did you mean 'paper'"):
        main(["papr"])
