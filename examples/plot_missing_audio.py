"""
What if there is no sound?
==========================

A file without a sound track, a muted segment, a broken microphone. A missing sound can be filled
with zeros, which say "silence", or masked, which says "nothing is known". And a model may have been
trained with missing sound, or not. Which of the two matters?
"""

# %%
# Made-up clips of 48 frames with one Action Unit. The face shows it under much noise, the sound
# shows it clearly: its loudness is 0 in silence. The sound is cut out in one gap per clip.

import matplotlib.pyplot as plt
import torch
from torch import nn

from mmau import AGSSM
from mmau.evaluation import average_precision
from mmau.modules import MaskedBCELoss


def clips(number: int, missing, seed: int):
    """Return visual and audio features, labels, and where there is sound."""
    random = torch.Generator().manual_seed(seed)
    label = (torch.randn(number, 6, 1, generator=random) > 0.9).repeat_interleave(8, 1).float()
    visual = label + torch.randn(number, 48, 2, generator=random)
    audio = 2 * label + 0.7 * torch.randn(number, 48, 1, generator=random)
    length = (torch.as_tensor(missing) * 48).round()
    start = (torch.rand(number, 1, generator=random) * (49 - length)).floor()
    frame = torch.arange(48)
    return visual, audio, label, (frame < start) | (frame >= start + length)


class Net(nn.Module):
    """A small detector that is conditioned on the loudness."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scan = nn.Linear(2, 12), AGSSM(12, 1, 4, dt_range=(0.03, 1.0))
        self.head = nn.Linear(24, 1)

    def forward(self, visual, audio, audio_mask, *, masked: bool):
        """Return one logit per frame."""
        x, filled = self.enter(visual), audio.where(audio_mask[..., None], 0.0)
        y, _ = self.scan(x, filled, audio_mask=audio_mask if masked else None)
        return self.head(torch.cat([x, y], dim=-1))


# %%
# Two models are trained with gaps of any length, masked or filled with zeros. One always has
# sound in training, and one never has: it is the video-only model.


def train(missing, *, masked: bool) -> Net:
    """Train one model; all models get the same visual features."""
    torch.manual_seed(0)
    net, loss = Net(), MaskedBCELoss()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(120):
        share = torch.rand(16, 1) if missing is None else missing
        visual, audio, label, audio_mask = clips(16, share, seed=step)
        optimizer.zero_grad()
        loss(net(visual, audio, audio_mask, masked=masked), label).backward()
        optimizer.step()
    return net


shares = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
gaps, zeros = train(None, masked=True), train(None, masked=False)
always_audio, video_only = train(0.0, masked=True), train(1.0, masked=True)
curves = {
    "trained with gaps, masked": (gaps, True, "tab:blue", "o-"),
    "trained with gaps, zeros": (zeros, False, "tab:blue", "o:"),
    "trained without gaps, masked": (always_audio, True, "tab:orange", "s-"),
    "trained without gaps, zeros": (always_audio, False, "tab:orange", "s:"),
}

# %%
# What matters is to be trained with missing sound. The models that were end where the video-only
# model stands, and between mask and zeros there is no difference worth a claim. The model that was
# not falls far below, either way: zeros mean silence to it, and the mask opens the gate wider than
# it ever was in training, which is worse here. So train with gaps. What the mask adds is a
# guarantee: what lies under it, NaN included, is never read, and a silence cannot be mistaken for a
# gap.

figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
with torch.no_grad():
    for name, (net, masked, color, style) in curves.items():
        scores = []
        for share in shares:
            visual, audio, label, audio_mask = clips(400, share, seed=1000)
            logits = net(visual, audio, audio_mask, masked=masked)
            scores.append(float(average_precision(logits.sigmoid(), label)))
        axis.plot(shares, scores, style, color=color, label=name)
        print(f"{name:28} {scores[0]:.2f} with all of the sound, {scores[-1]:.2f} without")
    visual, audio, label, audio_mask = clips(400, 1.0, seed=1000)
    logits = video_only(visual, audio, audio_mask, masked=True)
    baseline = float(average_precision(logits.sigmoid(), label))
axis.axhline(baseline, color="black", linewidth=1, linestyle="--", label="video only")
axis.set(xlabel="share of the clip without sound", ylabel="average precision", ylim=(0.3, 1.02))
axis.legend(fontsize=9, loc="lower left")
figure.suptitle("An audible Action Unit, as its sound goes missing")
plt.show()
