"""
What does a longer clip cost?
=============================

A scan, convolutions and attention read the same clip. Attention compares every frame with every
other one; the scan and the convolutions do the same work for each frame. And when frames arrive one
by one, what has to be kept differs more than the time does.
"""

# %%
# One layer of each, with 64 channels and 16 audio features, untrained, without gradients; six
# layers of convolutions, a receptive field of 253 frames. Times are those of the machine that
# built this page, the best of five; only their growth is of interest.

from time import perf_counter

import matplotlib.pyplot as plt
import torch

from mmau.modules import TEMPORAL_MODELS

torch.manual_seed(0)
options = {"agssm": {"num_layers": 1}, "tcn": {"num_layers": 6}, "transformer": {"num_layers": 1}}
titles = {"agssm": "scan (AGSSM)", "tcn": "convolutions (TCN)", "transformer": "attention"}
models = {name: TEMPORAL_MODELS.create(name, 64, 16, **options[name]).eval() for name in options}
lengths = (128, 256, 512, 1024, 2048)
visual, audio = torch.randn(1, lengths[-1], 64), torch.randn(1, lengths[-1], 16)


def numbers(state) -> int:
    """Return how many numbers a state holds."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    return sum(numbers(part) for part in state)


seconds = {name: [] for name in models}
kept = {name: [] for name in models}
with torch.inference_mode():
    for length in lengths:
        clip = visual[:, :length], audio[:, :length]
        for name, model in models.items():
            runs = []
            for _ in range(5):
                start = perf_counter()
                _, state = model(*clip)
                runs.append(perf_counter() - start)
            seconds[name].append(min(runs))
            kept[name].append(numbers(state))

# %%
# Left, time per frame: on a flat line a clip of twice the length costs twice, on a rising one up to
# four times. Right, what the next frame needs of the past: the scan keeps its state, the
# convolutions the frames of their receptive field, attention the keys and
# values of all frames, unless a `window` bounds it. In short clips attention costs about as much as
# the scan. Which of the three detects better is another question, which only data can answer.

for name in models:
    print(f"{titles[name]:20} {1000 * seconds[name][-1]:6.1f} ms for {lengths[-1]} frames")
looks = {
    "agssm": ("tab:orange", "o-"),
    "tcn": ("tab:gray", "s--"),
    "transformer": ("tab:blue", "^:"),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
for name, (color, style) in looks.items():
    per_frame = [1e6 * taken / length for taken, length in zip(seconds[name], lengths, strict=True)]
    left.loglog(lengths, per_frame, style, color=color, label=titles[name])
    right.loglog(lengths, kept[name], style, color=color, label=titles[name])
left.set(xlabel="frames in the clip", ylabel="microseconds per frame", title="time per frame")
right.set(xlabel="frames so far", ylabel="numbers to keep", title="memory of a stream")
for axis in (left, right):
    axis.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
    axis.minorticks_off()
left.legend(fontsize=8)
figure.suptitle("Scan, convolutions and attention as a clip gets longer")
plt.show()
