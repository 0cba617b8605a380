"""
What does the asymmetric loss do to a gradient?
===============================================

Most labels of a rare Action Unit are easy negatives. Binary cross-entropy keeps pulling on each of
them a little; the asymmetric loss ignores a negative once it is easy. The price is a shifted
decision: 0.5 no longer means "as likely as not".
"""

# %%
# Each curve is one entry of the loss against its logit. The gradient is taken by autograd through
# [asymmetric_loss][mmau.functional.asymmetric_loss], not drawn from a formula.

import matplotlib.pyplot as plt
import torch

from mmau.functional import asymmetric_loss, asymmetric_posterior

logit = torch.linspace(-6, 6, 481, requires_grad=True)
settings = {"BCE": {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0}, "ASL (1, 4, 0.05)": {}}
curves = {}
for name, options in settings.items():
    for label in (1, 0):
        target = torch.full_like(logit, label)
        loss = asymmetric_loss(logit, target, reduction="none", **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logit)
        curves[f"{name}, label {label}"] = loss.detach(), gradient

# %%
# A network that fits its data perfectly does not output the posterior under this loss, but a
# number whose relation to it is known in closed form,
# [asymmetric_posterior][mmau.functional.asymmetric_posterior]. An output of 0.5 stands for 0.147.
# So compare losses at tuned thresholds: at 0.5 one compares thresholds.

logit = logit.detach()
output, posterior = logit.sigmoid(), asymmetric_posterior(logit)
at_half = float(asymmetric_posterior(torch.zeros(1)))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6))
for name, (loss, gradient) in curves.items():
    style = {
        "color": "tab:gray" if name.startswith("BCE") else "tab:orange",
        "linestyle": "-" if name.endswith("1") else "--",
        "label": name,
    }
    left.plot(logit, loss, **style)
    middle.plot(logit, gradient, **style)
left.set(title="loss", xlabel="logit", ylim=(-0.1, 7.5))
left.legend(fontsize=7, loc="upper center", ncols=2)
middle.set(title="gradient", xlabel="logit")
right.plot(output, output, color="tab:gray", label="BCE")
right.plot(output, posterior, color="tab:orange", label="ASL (1, 4, 0.05)")
right.plot([0.5, 0.5, 0], [0, at_half, at_half], color="black", linewidth=0.8)
right.annotate(f"0.5 stands for {at_half:.3f}", (0.52, at_half - 0.08), fontsize=8)
right.set(title="what an output stands for", xlabel="output", ylabel="posterior")
right.legend(fontsize=7)
figure.suptitle("Binary cross-entropy and the asymmetric loss")
plt.show()
