"""
How many parameters does LoRA train?
====================================

The encoders are the big part of a detector, and they stay frozen. What learns are pairs of thin
matrices beside the queries and values of each layer. How thin, and in how many layers, is the
budget.
"""

# %%
# Nothing is downloaded and nothing is allocated: on PyTorch's `meta` device a model has shapes and
# no numbers. `pretrained=False` gives the architecture of the published name.

import matplotlib.pyplot as plt
import torch

from mmau.encoders import AUDIO_ENCODERS, VISUAL_ENCODERS
from mmau.encoders.backbone import count_parameters


def budget(registry, name: str, weights: str, **options) -> tuple[int, int]:
    """Count trainable and all parameters of an encoder."""
    with torch.device("meta"):
        encoder = registry.create(name, weights, pretrained=False, **options)
    return count_parameters(encoder)


attention = {"d_bottleneck": None, "lora_place": "attention", "attention": "sdpa"}
encoders = {
    "DINOv2-L": (VISUAL_ENCODERS, "dinov2", "facebook/dinov2-large", {}),
    "ViT-B": (VISUAL_ENCODERS, "vit", "google/vit-base-patch16-224", {}),
    "WavLM-L": (AUDIO_ENCODERS, "wavlm", "microsoft/wavlm-large", attention),
    "Whisper-base": (AUDIO_ENCODERS, "whisper", "openai/whisper-base", {}),
}
ranks = (2, 8, 32)
by_rank, total = {}, {}
for title, (registry, name, weights, options) in encoders.items():
    counts = [budget(registry, name, weights, lora_rank=rank, **options) for rank in ranks]
    by_rank[title] = [trainable for trainable, _ in counts]
    total[title] = counts[0][1] - counts[0][0]
    share = 100 * by_rank[title][1] / total[title]
    print(f"{title:12} {total[title] / 1e6:5.0f} M frozen, rank 8 adds {share:.2f} %")

# %%
# Rank and number of layers count alike: a quarter of the layers at four times the rank costs the
# same. `lora_layers` takes the last ones, next to the output; the layers before them then need no
# backward pass. DINOv2-L and WavLM-L have the same width and depth, so their lines coincide. The
# default of WavLM is not LoRA but bottleneck adapters of width 64 and a mix of its layers; the star
# is what those cost. How large a budget must be to detect well, no count of parameters can tell.

layers = (1, 6, 12, 24)
by_layers = [
    budget(VISUAL_ENCODERS, "dinov2", "facebook/dinov2-large", lora_layers=count)[0]
    for count in layers[:-1]
] + by_rank["DINOv2-L"][1:2]
adapters, _ = budget(AUDIO_ENCODERS, "wavlm", "microsoft/wavlm-large")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
markers = {"DINOv2-L": "o-", "ViT-B": "s--", "WavLM-L": "D:", "Whisper-base": "v-."}
colors = ("tab:blue", "tab:gray", "tab:orange", "black")
for color, (title, counts) in zip(colors, by_rank.items(), strict=True):
    label = f"{title} ({total[title] / 1e6:.0f} M)"
    size = 4 if title == "WavLM-L" else 9 if title == "DINOv2-L" else 6
    left.loglog(ranks, counts, markers[title], color=color, markersize=size, label=label)
left.plot(ranks[1], adapters, "*", color="tab:orange", markersize=13, label="WavLM-L, adapters")
left.set_xticks(ranks, [str(rank) for rank in ranks])
left.minorticks_off()
left.set(xlabel="rank, in all layers", ylabel="trainable parameters", title="by encoder and rank")
left.legend(fontsize=7.5)
right.bar([str(count) for count in layers], by_layers, color="tab:blue", width=0.6)
for place, count in enumerate(by_layers):
    right.text(place, count + 1e4, f"{count / 1e3:.0f} k", ha="center", fontsize=9)
right.set(xlabel="adapted layers of DINOv2-L, rank 8", title="by layers", ylim=(0, 9e5), yticks=[])
figure.suptitle("What LoRA leaves to be trained in a frozen encoder")
plt.show()
