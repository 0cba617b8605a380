"""
How long does the state remember?
=================================

A state of the scan forgets at a steady rate: half of it is gone after ln 2 / (delta |A|) frames.
Delta is chosen frame by frame, A is learned. Between them an untrained model already covers
memories from a fraction of a frame to half a minute.
"""

# %%
# [AGSSM][mmau.AGSSM] draws its step sizes log-uniformly between `dt_range[0]` and `dt_range[1]` and
# starts its 16 states per channel with decay rates 1 to 16.
# [half_life][mmau.functional.half_life] turns both into seconds.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from mmau import AGSSM
from mmau.functional import half_life, selective_scan

frame_rate = 25.0
torch.manual_seed(0)
model = AGSSM(d_model=256, d_audio=64)
delta, A = F.softplus(model.selection.delta_bias).detach(), -model.A_log.exp().detach()
lives = half_life(delta, A, frame_rate=frame_rate)
print(f"{lives.numel()} states, half-lives of {lives.min():.3f} to {lives.max():.1f} s")
for seconds in (1 / frame_rate, 1.0, 10.0):
    share = float((lives > seconds).float().mean())
    print(f"longer than {seconds:5.2f} s: {100 * share:4.1f} %")

# %%
# Is it true? One frame is shown to a few states, then nothing, and the scan is left alone for
# twenty seconds. Where the curve of a state crosses one half, its half-life must lie.

steps = torch.tensor([0.001, 0.003, 0.01, 0.03, 0.1])
frames, channels = 500, len(steps)
shown = torch.zeros(1, frames, channels)
shown[:, 0] = 1.0
ones = torch.ones(1, frames, 1)
rate = -torch.ones(channels, 1)
memory = selective_scan(shown, steps.expand(1, frames, -1), rate, ones, ones)[0]
memory = memory / memory[0]
predicted = half_life(steps, rate, frame_rate=frame_rate)[:, 0]

# %%
# Left: the crosses are the formula, the curves are the scan. The slowest state keeps three fifths
# for all of the twenty seconds. Right: what a new model comes with. Large decay rates shorten
# memories, so long ones are rare: if a task needs them, lower `dt_range`. Training moves both delta
# and A; these are starting points, and what a trained model remembers has to be looked up in it.

time = torch.arange(frames) / frame_rate
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
colors = plt.cm.viridis(torch.linspace(0.85, 0, channels).tolist())
for channel, step in enumerate(steps.tolist()):
    left.plot(time, memory[:, channel], color=colors[channel], label=f"delta = {step:g}")
    if predicted[channel] < time[-1]:
        left.plot(predicted[channel], 0.5, "x", color="black", markersize=8)
left.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
left.set(xlabel="seconds after the frame", title="what is left of one frame", ylim=(0, 1.02))
left.legend(fontsize=8, loc="upper right")
bins = torch.logspace(-2, 1.6, 37).tolist()
groups = [lives[:, :1].flatten(), lives[:, 1:].flatten()]
right.hist(
    [values.numpy() for values in groups],
    bins,
    weights=[torch.full_like(values, 100 / lives.numel()).numpy() for values in groups],
    color=["tab:orange", "lightsteelblue"],
    label=["slowest of a channel", "the other fifteen"],
    stacked=True,
)
right.axvline(1 / frame_rate, color="black", linewidth=0.8, linestyle=":")
right.annotate("one frame", (1.1 / frame_rate, 6.3), fontsize=8)
right.set(xscale="log", xlabel="half-life (s)", ylabel="% of the states", ylim=(0, 7))
right.set_title("an untrained model")
right.legend(fontsize=8, loc="upper right")
figure.suptitle("Half-lives of the states of the scan")
plt.show()
