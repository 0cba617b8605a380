"""
Do all scan backends compute the same?
======================================

One equation, several implementations. Each is held against the same sum in double precision, for
step sizes from a millionth of a frame to twenty frames. The last curve is the equation as the paper
prints it, typed in literally.
"""

# %%
# Whatever is registered in [SCAN_BACKENDS][mmau.functional.SCAN_BACKENDS] and can be had on this
# machine takes part, your own plug-ins too. `"compiled"` is built when it is first asked for,
# which takes a quarter of a minute, once.

import matplotlib.pyplot as plt
import torch

from mmau.functional import SCAN_BACKENDS, selective_scan
from mmau.registry import MissingDependencyError

names = []
for name in SCAN_BACKENDS:
    try:
        if "cpu" in SCAN_BACKENDS.get(name).devices:
            names.append(name)
        else:
            print(f"{name}: not on a CPU")
    except MissingDependencyError as missing:
        print(f"{name}: {missing}")

# %%
# Random inputs, 128 frames, 32 channels, 16 states with decay rates 1 to 16. The step is the same
# in all frames. The error is the largest one, relative to the largest output.

generator = torch.Generator().manual_seed(0)
x, B, C = (torch.randn(2, 128, size, generator=generator) for size in (32, 16, 16))
A = -torch.arange(1.0, 17.0).expand(32, 16)


def literal(x, delta, A, B, C):
    """The printed formula: the input matrix is (delta A)^-1 (exp(delta A) - 1) delta B."""
    h, outputs = 0.0, []
    for frame in range(x.shape[1]):
        decay = torch.exp(delta[:, frame, :, None] * A)
        step = delta[:, frame, :, None] * B[:, frame, None]
        h = decay * h + (decay - 1) / (delta[:, frame, :, None] * A) * step * x[:, frame, :, None]
        outputs.append((h * C[:, frame, None]).sum(-1))
    return torch.stack(outputs, dim=1)


steps = torch.logspace(-6, 1.3, 12)
errors = {name: [] for name in [*names, "formula, literally"]}
for step in steps:
    inputs = x, torch.full_like(x, float(step)), A, B, C
    exact = selective_scan(*(value.double() for value in inputs), backend="reference")
    for name, found in errors.items():
        y = selective_scan(*inputs, backend=name) if name in names else literal(*inputs)
        found.append(float((y - exact).abs().max() / exact.abs().max()))

# %%
# All backends stay within a dozen times the resolution of single precision, whatever the step. The
# literal formula subtracts two numbers that are nearly equal when the step is small: a thousandth
# of a frame, where [AGSSM][mmau.AGSSM] starts its slowest channels, costs it about two digits, and
# delta = 0, by which a masked frame leaves the state alone, would be 0 / 0. The backends compute
# the same quantity without that difference.

for name, found in errors.items():
    print(f"{name:20} largest relative error {max(found):.1e}")
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
styles = ("o-", "s--", "^:", "v-.")
colors = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
for place, name in enumerate(names):
    style, color = styles[place % 4], colors[place % 4]
    axis.loglog(steps, errors[name], style, color=color, markersize=5, label=name)
label = "the formula, literally"
axis.loglog(steps, errors["formula, literally"], "x-", color="black", linewidth=1, label=label)
eps = torch.finfo(torch.float32).eps
axis.axhline(eps, color="tab:gray", linewidth=1, linestyle=":")
axis.annotate("resolution of float32", (9e-7, 0.6 * eps), fontsize=8, color="dimgray")
axis.set(xlabel="step size delta (frames)", ylabel="largest relative error", ylim=(3e-8, None))
axis.legend(fontsize=9, title="float32", title_fontsize=9)
figure.suptitle("Every scan backend against double precision")
plt.show()
