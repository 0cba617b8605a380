"""
Which F1 did you report?
========================

"Mean F1" is at least four numbers. Here are the same predictions for the same labels, scored in the
four ways that are found in public code. Only the first is the official metric of Aff-Wild2.
"""

# %%
# A hundred videos with the positive rates of Aff-Wild2. How often an Action Unit occurs differs
# from video to video, and it comes and goes in episodes of a second. The model is equally good at
# all twelve: it errs by the same noise.

import matplotlib.pyplot as plt
import torch

from mmau.evaluation import AUCounts, bootstrap_by_video, trivial_baselines

torch.manual_seed(0)
rate = torch.tensor([11.8, 5, 15.4, 26.6, 39.7, 34.4, 24.5, 2.8, 3.1, 2.6, 62.7, 7.4]) / 100
drift, episodes = 2.5 * torch.randn(100, 1, 12), 1.5 * torch.randn(100, 20, 12)
urge = (drift + episodes).repeat_interleave(30, dim=1)  # 100 videos, 600 frames, 12 AUs
cut = torch.stack([urge[..., c].quantile(1 - rate[c]) for c in range(12)])
truth = urge > cut
predicted = 2.2 * truth + torch.randn(truth.shape) > 1.6

# %%
# [AUCounts][mmau.evaluation.AUCounts] adds up counts over everything and takes F1 once; it can do
# nothing else. The means over batches and videos need a helper, which must invent a score where an
# Action Unit does not occur: 0, as in most code. That is why they are lowest for rare ones.


def mean_of_f1(predicted, truth):
    """Mean over the first axis of the F1 along the second."""
    hits, wrong = (predicted & truth).sum(1), (predicted ^ truth).sum(1)
    return torch.where(hits + wrong > 0, 2 * hits / (2 * hits + wrong).clamp(min=1), 0).mean(0)


per_video = [AUCounts().update(p, t) for p, t in zip(predicted, truth, strict=True)]
pooled = AUCounts().update(predicted, truth)
negative = AUCounts().update(~predicted, ~truth)
batches = torch.randperm(60_000).reshape(-1, 16)
ways = {
    "pooled (the official one)": pooled.f1(),
    "mean of both classes": (pooled.f1() + negative.f1()) / 2,
    "mean over videos": mean_of_f1(predicted, truth),
    "mean over batches of 16": mean_of_f1(*(x.flatten(0, 1)[batches] for x in (predicted, truth))),
}

# %%
# The black bar is the 95 % CI from [resampling videos][mmau.evaluation.bootstrap_by_video]: none of
# the other three lies in it. The dotted line is what predicting every Action Unit in every frame
# scores, [a baseline][mmau.evaluation.trivial_baselines] to print beside every result.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10.5, 3.8), width_ratios=[1, 1.5], layout="constrained"
)
order = rate.argsort(descending=True).tolist()
colors, markers = ["tab:orange", "lightsteelblue", "darkseagreen", "silver"], "osv^"
for row, (name, scores) in enumerate(ways.items()):
    left.barh(row, float(scores.mean()), color=colors[row])
    left.text(0.02, row, f"{scores.mean():.2f}  {name}", va="center", fontsize=8)
    right.plot(scores[order], color=colors[row], marker=markers[row], linewidth=1, label=name)
interval = bootstrap_by_video(per_video)
left.plot([interval.low, interval.high], [0.3, 0.3], color="black", linewidth=3)
baseline = trivial_baselines(truth).mean_all_ones
left.axvline(baseline, color="black", linestyle=":", linewidth=1, zorder=0)
left.text(baseline + 0.01, 3.66, "every AU in every frame", fontsize=7)
left.set(title="mean over 12 Action Units", xlabel="F1", yticks=[], ylim=(3.8, -0.6))
right.set_xticks(
    range(12), [f"{pooled.au_names[c]}\n{100 * rate[c]:.3g} %" for c in order], fontsize=7
)
right.set(title="each Action Unit, frequent to rare", ylabel="F1", ylim=(0, 1))
right.legend(fontsize=7, loc="lower left")
figure.suptitle("One set of predictions, four kinds of F1")
plt.show()
