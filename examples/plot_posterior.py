"""
Why does 0.5 on an ASL model mean 0.147?
========================================

The asymmetric loss ignores easy negatives, so a model trained with it says "active" sooner than
the frequencies justify. How much sooner is known in closed form. Here a model is trained until it
has nothing left to learn, and its outputs are held against how often the label was really 1.
"""

# %%
# The data are as simple as data can be: one number, from which the probability of the label
# follows exactly. A small network is trained on it with
# [AsymmetricLoss][mmau.modules.AsymmetricLoss], and another one with
# [FocalLoss][mmau.modules.FocalLoss]. Both are trained on the same data.

import matplotlib.pyplot as plt
import torch
from torch import nn

from mmau.modules import AsymmetricLoss, FocalLoss

generator = torch.Generator().manual_seed(0)
feature = torch.rand(20_000, 1, generator=generator) * 8 - 4
label = (torch.rand(feature.shape, generator=generator) < torch.sigmoid(1.5 * feature)).float()


def train(loss: nn.Module) -> torch.Tensor:
    """Return the logits of a small network after training on all of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(feature), label).backward()
        optimizer.step()
    return model(feature).detach()


# %%
# In each bin of predictions, how often was the label 1? On the diagonal a prediction is a
# probability. The sigmoid of an ASL model is far from it; its `posterior`, in which nothing is
# fitted, is on it. Focal loss is right at 0.5 and too unsure of itself on either side.
#
# The way back, `logits_from_posterior`, says where the usual 0.5 of a probability lies on the
# sigmoid, and so which threshold an ASL model should have had.


def reliability(prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return mean prediction and frequency of the label in 15 bins, and the mean distance."""
    bins = (prob * 15).long().clamp(max=14).flatten()
    count = torch.bincount(bins, minlength=15).clamp(min=1)
    predicted = torch.bincount(bins, weights=prob.flatten(), minlength=15) / count
    observed = torch.bincount(bins, weights=label.flatten(), minlength=15) / count
    error = float(((predicted - observed).abs() * count).sum() / count.sum())
    used = count > 50
    return predicted[used], observed[used], error


asl, focal = AsymmetricLoss(), FocalLoss()
output = torch.linspace(0, 1, 201)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for axes, loss, name in ((left, asl, "ASL (1, 4, 0.05)"), (right, focal, "focal (2)")):
    logits = train(loss)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.plot(output, loss.posterior(torch.logit(output)), color="tab:gray", label="closed form")
    for prob, what, color in (
        (logits.sigmoid(), "sigmoid", "tab:orange"),
        (loss.posterior(logits), "posterior", "tab:blue"),
    ):
        predicted, observed, error = reliability(prob)
        label_text = f"{what}, off by {error:.3f}"
        axes.plot(predicted, observed, "o", color=color, markersize=5, label=label_text)
    axes.set(title=name, xlabel="prediction", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(fontsize=8, loc="upper left")
    print(f"{name}: sigmoid 0.5 stands for {float(loss.posterior(torch.zeros(1))):.3f}")

half = float(asl.posterior(torch.zeros(1)))
threshold = float(asl.logits_from_posterior(torch.tensor([0.5])).sigmoid())
left.plot([0.5, 0.5, 0], [0, half, half], color="tab:red", linewidth=0.8)
left.annotate(f"0.5 stands for {half:.3f}", (0.655, half - 0.06), fontsize=8)
left.plot([threshold, threshold, 0], [0, 0.5, 0.5], color="tab:red", linewidth=0.8, linestyle=":")
left.annotate(f"{threshold:.3f} for 0.5", (threshold + 0.02, 0.4), fontsize=8)
left.set_ylabel("how often the label was 1")
figure.suptitle("What predictions stand for, before and after the posterior")
plt.show()
