"""
Which sound belongs to which frame?
===================================

Video frames come when the camera delivers them, audio features come fifty times a second. Pairing
them by index assumes a frame rate, and the assumption breaks at the first dropped frame. Pairing
them by time does not.
"""

# %%
# A camera that announces 30 frames per second, jitters by a few milliseconds and loses eleven
# frames around the second second. The audio feature is a slow tone; from 3.0 to 3.3 s the
# microphone was off, which its mask says.

import math

import matplotlib.pyplot as plt
import torch

from mmau.functional import interpolate_features

torch.manual_seed(0)


def tone(time: torch.Tensor) -> torch.Tensor:
    """Return the signal that both clocks sample."""
    return torch.sin(2 * math.pi * 0.9 * time)


ticks = torch.arange(130, dtype=torch.float64) / 30
frame_times = ticks + 0.004 * torch.randn(130, dtype=torch.float64)
frame_times = frame_times[(ticks < 1.7) | (ticks > 2.05)]
feature_times = (torch.arange(200, dtype=torch.float64) + 0.5) / 50
features = tone(feature_times)
has_audio = (feature_times < 3.0) | (feature_times > 3.3)
features[~has_audio] = math.nan  # what is masked is never read

# %%
# [interpolate_features][mmau.functional.interpolate_features] takes both clocks in seconds. A frame
# with no usable feature within `max_gap` gets zero and is not valid: the mask, not the zero, says
# that there was no sound. [AGSSM][mmau.AGSSM] takes that mask as `audio_mask`.

aligned, valid = interpolate_features(
    features[None, :, None],
    feature_times[None],
    frame_times[None],
    feature_mask=has_audio[None],
    max_gap=0.04,
)
aligned, valid = aligned[0, :, 0], valid[0]
print(f"{len(frame_times)} frames, {int((~valid).sum())} of them without sound")

# %%
# The other way: frame i takes feature 50 / 30 i. After the dropped frames it is a third of a second
# late, for the rest of the file. By time, what is off lies at the edges of a gap, where the nearest
# feature is held for up to `max_gap`. The last frames come after the end of the sound.

index = (torch.arange(len(frame_times)) * 50 / 30).round().long().clamp(max=len(features) - 1)
by_index, true = features[index], tone(frame_times)
late = frame_times - feature_times[index]
error = (aligned - true)[valid].abs()
print(f"by time: off by {error.median():.4f} in the middle, {error.max():.2f} at the worst")
print(f"by index: up to {late.abs().max():.2f} s away")

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(10, 5), sharex=True, height_ratios=[2, 1], layout="constrained"
)
top.plot(feature_times, features, color="lightgray", linewidth=6, label="sound, 50 per second")
top.plot(frame_times, by_index, "x", color="tab:orange", markersize=5, label="frames, by index")
top.plot(frame_times[valid], aligned[valid], ".", color="tab:blue", label="frames, by time")
top.plot(frame_times[~valid], aligned[~valid], "|", color="black", markersize=9, label="not valid")
top.set(ylabel="feature", ylim=(-1.2, 1.75), title="the audio feature of each frame")
top.legend(fontsize=8, ncols=4, loc="upper center")
bottom.plot(frame_times, late, "x", color="tab:orange", markersize=4)
bottom.plot(frame_times[valid], torch.zeros(int(valid.sum())), ".", color="tab:blue")
bottom.set(xlabel="time (s)", ylabel="seconds late", title="by how much the sound is late")
for axis in (top, bottom):
    axis.axvspan(1.7, 2.05, color="tab:gray", alpha=0.15, linewidth=0)
    axis.axvspan(3.0, 3.3, color="tab:gray", alpha=0.15, linewidth=0)
bottom.annotate("frames dropped", (1.62, 0.3), fontsize=8, ha="right")
bottom.annotate("microphone off", (3.15, 0.1), fontsize=8, ha="center")
figure.suptitle("Sound and frames, paired by index and by time")
plt.show()
