"""
How do I use my own encoder?
============================

A visual encoder is anything that turns an image into patch tokens and says how wide they are and
how large a patch is. Registered under a name, it takes its place in a detector by that name. Models
of the transformers library need five lines.
"""

# %%
# All of an encoder: `d_out`, `patch_size` and a `forward`, no base class. Here it is four
# convolutions, each of which halves the image, so a patch of 16 x 16 pixels becomes one token.

import math

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.cbook import get_sample_data
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, HubertConfig, HubertModel

from mmau.encoders import (
    AUDIO_ENCODERS,
    VISUAL_ENCODERS,
    AdapterOptions,
    HuggingFaceSpeechEncoder,
    HuggingFaceVisualEncoder,
    VisualFeatures,
)
from mmau.models import Component, DetectorConfig, build_detector


@VISUAL_ENCODERS.register("convolutions")
class Convolutions(nn.Module):
    """Four strided convolutions."""

    d_out, patch_size = 48, 16

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 24, 32, 48)
        layers = [nn.Conv2d(sizes[i], sizes[i + 1], 2, stride=2) for i in range(4)]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))

    def forward(self, images: torch.Tensor) -> VisualFeatures:
        """Turn `(b, 3, h, w)` in [0, 1] into tokens `(b, p, d)` and rows and columns."""
        grid = self.layers(images - 0.5)
        return VisualFeatures(rearrange(grid, "b d h w -> b (h w) d"), tuple(grid.shape[-2:]))


# %%
# A CLIP and a HuBERT, small and with random weights so that nothing is downloaded. With
# `CLIPVisionModel.from_pretrained(...)` in their place they are the published ones; those can also
# be had without any code, by the names `"hf_vision"` and `"hf_speech"`.

sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@VISUAL_ENCODERS.register("small_clip")
def small_clip() -> HuggingFaceVisualEncoder:
    """Build a CLIP of two layers."""
    config = CLIPVisionConfig(**sizes, intermediate_size=96, patch_size=16, image_size=224)
    return HuggingFaceVisualEncoder(CLIPVisionModel(config), AdapterOptions(freeze_backbone=False))


@AUDIO_ENCODERS.register("small_hubert")
def small_hubert() -> HuggingFaceSpeechEncoder:
    """Build a HuBERT of two layers, frozen, with adapters."""
    config = HubertConfig(**sizes, intermediate_size=96, conv_dim=[16] * 7)
    adapters = AdapterOptions(d_bottleneck=8, mix_layers=True)
    return HuggingFaceSpeechEncoder(HubertModel(config), adapters)


# %%
# Three detectors that differ in one word. They read the same second: one photograph, 25 times, and
# a tone. (Landmarks are left out here by pooling over the whole face; HGA takes the same tokens.)

with get_sample_data("grace_hopper.jpg") as stream:  # US Navy, public domain
    photograph = torch.from_numpy(plt.imread(stream, format="jpg").copy())
crop = photograph[45:397, 90:442].permute(2, 0, 1)[None] / 255
crop = nn.functional.interpolate(crop, (224, 224), mode="area")
images = crop.expand(25, -1, -1, -1)[None]
sound = torch.sin(2 * math.pi * 220 * torch.arange(16000) / 16000)[None]
times, valid = torch.arange(25)[None] / 25, torch.ones(1, 25, dtype=torch.bool)

figure, panels = plt.subplots(1, 4, figsize=(11, 3.6), layout="constrained")
panels[0].imshow(crop[0].permute(1, 2, 0).numpy())
panels[0].set_title("the crop")
for axis, name in zip(panels[1:], ("convolutions", "small_clip", "tiny"), strict=True):
    torch.manual_seed(0)
    config = DetectorConfig(
        visual=Component(name, {"image_size": 224, "patch_size": 14} if name == "tiny" else {}),
        audio=Component("small_hubert"),
        alignment="global_pool",
        d_model=32,
        d_audio=16,
    )
    detector = build_detector(config).eval()
    with torch.no_grad():
        logits = detector(images, None, valid, sound, times)
        tokens, grid = detector.visual_encoder(crop)
    print(f"{name:12} tokens {tuple(tokens.shape)}, logits {tuple(logits.shape)}")
    centred = tokens[0] - tokens[0].mean(0)
    colours = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    axis.imshow(((colours - low) / (high - low)).clamp(0, 1).view(*grid, 3).numpy())
    axis.set_title(f'"{name}"\n{grid[0]} x {grid[1]} tokens of width {tokens.shape[-1]}')
for axis in panels:
    axis.set_axis_off()
figure.suptitle("Patch tokens of three encoders, untrained\n")
plt.show()

# %%
# The colours are the three main directions of the tokens. **Nothing has been trained**: what shows
# is that a token belongs to its place in the image, and no more.
#
# [save_pretrained][mmau.models.save_pretrained] stores the name of an encoder and its weights, so
# whoever loads the checkpoint must have registered that name before. A package can do so in its
# `pyproject.toml`, by an entry point in the group `mmau.visual_encoders`.
