"""
How does a sigh open the memory?
================================

In AGSSM the sound decides how fast the state follows the face. The step size delta is large where
there is sound: the state then takes in the visual input. In silence delta is small, and the state
keeps what it has.
"""

# %%
# The weights are **set by hand**, so that each does one thing; training would find its own. One
# channel follows the jaw. Its delta rises with the loudness, its projections B and C are constant.

import math

import matplotlib.pyplot as plt
import torch

from mmau import AGSSM

model = AGSSM(d_model=2, d_audio=1, d_state=1)
select = model.selection
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()  # A_log = 0 is a decay rate of 1
    select.fuse.weight[0, 2] = 1.0  # s_0 is the loudness
    select.fuse.bias[1] = 1.0  # s_1 is 1
    select.to_delta.weight[0, 0] = 6.0
    select.delta_bias.fill_(math.log(math.expm1(0.003)))  # delta in silence
    select.to_B.weight[0, 1] = select.to_C.weight[0, 1] = 1.0
    select.to_gate.weight[0, 0] = 4.0

# %%
# Twelve seconds at 25 frames per second. The jaw drops twice, once in silence and once in a sigh: a
# noise that swells and fades, whose loudness is measured frame by frame.

time = torch.arange(300) / 25
jaw = sum(torch.exp(-(((time - peak) / 0.5) ** 2)) for peak in (2.5, 6.5))
torch.manual_seed(0)
swell = torch.exp(-(((torch.arange(300 * 640) / 16000 - 6.3) / 0.6) ** 2))
loudness = (torch.randn(300 * 640) * swell).view(300, 640).std(dim=1)
visual, audio = torch.stack([jaw, torch.zeros(300)], dim=-1)[None], loudness[None, :, None]
with torch.no_grad():
    with_audio, _ = model(visual, audio)
    selection = model.selection(visual, audio)
    without, _ = model(visual)  # no sound: the gate is 1, delta is that of silence
delta = selection.delta[0, :, 0]

# %%
# The half-life of what the state holds is ln 2 / delta frames here: seconds in silence, less than a
# frame at the height of the sigh.

figure, axes = plt.subplots(2, 2, figsize=(10, 4.8), sharex=True)
(audio_axis, memory_axis), (visual_axis, state_axis) = axes
audio_axis.fill_between(time, loudness, color="tab:blue", alpha=0.5)
audio_axis.set_title("loudness of the sound")
visual_axis.fill_between(time, jaw, color="tab:gray", alpha=0.5)
visual_axis.set(title="drop of the jaw", xlabel="time (s)")
memory_axis.semilogy(time, math.log(2) / delta / 25, color="tab:orange")
memory_axis.set_title("half-life of the state (s)")
memory_axis.annotate("delta closed", (0.2, 4), fontsize=8)
memory_axis.annotate("delta open", (6.7, 0.05), fontsize=8)
state_axis.plot(time, with_audio[0, :, 0], color="tab:orange", label="with the sound")
state_axis.plot(time, without[0, :, 0], color="tab:gray", label="without it")
state_axis.set(title="state", xlabel="time (s)")
state_axis.legend(fontsize=8)
figure.suptitle("A sigh opens the gate of an audio-guided state space model")
plt.show()
