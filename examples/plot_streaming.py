"""
What does one more frame cost?
==============================

A recurrence can be fed by a camera: everything that it remembers is in a state of fixed size.
Frame by frame it gives what it gives for the whole clip, and the thousandth frame costs what the
first did.
"""

# %%
# [AGSSM][mmau.AGSSM] as it is initialised, on random features. `forward` reads the clip at once,
# `step` one frame at a time.

from time import perf_counter

import matplotlib.pyplot as plt
import torch

from mmau import AGSSM

torch.manual_seed(0)
model = AGSSM(d_model=32, d_audio=8).eval()
visual, audio = torch.randn(1, 1024, 32).cumsum(1) / 8, torch.randn(1, 1024, 8)
state, stepped, seconds = None, [], []
with torch.inference_mode():
    whole, _ = model(visual, audio)
    for frame in range(visual.shape[1]):
        start = perf_counter()
        out, state = model.step(visual[:, frame], audio[:, frame], state)
        seconds.append(perf_counter() - start)
        stepped.append(out)
stepped = torch.stack(stepped, dim=1)
error = float((stepped - whole).abs().max())
print(f"largest difference {error:.1e}, outputs up to {float(whole.abs().max()):.1f}")

# %%
# The alternative without a state is to read everything again whenever a frame arrives; its cost
# grows with the clip. Times are those of the machine that built this page.

lengths = (1, 128, 256, 512, 768, 1024)
again = []
with torch.inference_mode():
    for length in lengths:
        runs = []
        for _ in range(5):
            start = perf_counter()
            model(visual[:, :length], audio[:, :length])
            runs.append(perf_counter() - start)
        again.append(1000 * min(runs))
blocks = 1000 * torch.tensor(seconds).view(-1, 64).median(dim=1).values

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for channel in range(3):
    (line,) = left.plot(whole[0, :120, channel], label="whole clip" if channel == 0 else None)
    dots = {"linestyle": "", "marker": ".", "markersize": 4, "color": line.get_color()}
    left.plot(stepped[0, :120, channel], **dots, label="step by step" if channel == 0 else None)
left.set(xlabel="frame", title="the same output, three channels")
left.legend(fontsize=8)
right.plot(lengths, again, "o-", color="tab:gray", label="read everything again")
right.plot(torch.arange(32, 1024, 64), blocks, ".-", color="tab:orange", label="step")
right.set(
    xlabel="frames so far", ylabel="ms per new frame", ylim=(0, None), title="the cost of a frame"
)
right.legend(fontsize=8)
figure.suptitle("Streaming equals the scan, at constant cost")
plt.show()
