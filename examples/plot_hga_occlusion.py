"""
What does a covered mouth do to the rest of the face?
=====================================================

A hand, a cup, a mask: part of the face is often covered. The mean of a region changes only if the
region itself is covered. In HGA every region attends to the whole face, so all of them change;
unless a mask leaves out the covered patches.
"""

# %%
# **Nothing here has been trained.** The tokens are the pixels of each patch, and the weights are as
# drawn, with one projection for queries and keys. The cover is a flat grey; the landmarks are those
# of the uncovered face.

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from skimage.data import astronaut

from mmau import HGA, LandmarkToPatch
from mmau.functional import region_pooling
from mmau.media import FACE_DETECTORS, FaceTracker, align_faces
from mmau.media.mediapipe import MediaPipeLandmarks
from mmau.plot import draw_regions

photograph = astronaut()  # Eileen Collins; NASA, public domain
face = FaceTracker(FACE_DETECTORS.create("mediapipe"), MediaPipeLandmarks()).update(photograph)
crops, landmarks = align_faces([photograph], face.landmarks[None], 224)
clear = torch.from_numpy(crops[0]).float() / 255
covered_patches = torch.zeros(16, 16, dtype=torch.bool)
covered_patches[9:15, 3:13] = True
cover = covered_patches.repeat_interleave(14, 0).repeat_interleave(14, 1)
covered = clear.where(~cover[..., None], torch.tensor(0.45))


def tokens(image: torch.Tensor) -> torch.Tensor:
    """Return the pixels of each patch of 14 x 14 as one token."""
    return rearrange(image - clear.mean(), "(h a) (w b) c -> (h w) (a b c)", a=14, b=14)


to_patches = LandmarkToPatch("ibug68")
weights, _ = to_patches(torch.from_numpy(landmarks[0]), grid_size=(16, 16), image_size=(224, 224))
torch.manual_seed(0)
hga = HGA(d_visual=588, d_model=96, num_heads=8)
usable = ~covered_patches.flatten()
with torch.no_grad():
    hga.to_query.weight.copy_(12 * hga.to_key.weight)
    mean = [region_pooling(tokens(image), weights).local for image in (clear, covered)]
    before = hga(tokens(clear), weights, return_attention=True)
    after = hga(tokens(covered), weights, return_attention=True)
    masked = hga(tokens(covered), weights, mask=usable)
    same = torch.equal(masked.tokens, hga(tokens(clear), weights, mask=usable).tokens)
print("with the mask it does not matter what covers the mouth:", same)

# %%
# How far has a region's token moved? The unit is the usual distance between two regions of the
# uncovered face, so 1 means that it has moved as far as another region is away.
#
# The means of open regions stay where they are. HGA carries the cover into every region: a third of
# a distance, even to the brows. With a mask of usable patches nothing of the cover comes in, to the
# bit; what is left of the change is the part of the face that is left out. Which of the three
# serves a detector better is not shown here: a trained one may profit from the wider context.


def moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the distance of each region's token, in distances between regions."""
    return (new - old).norm(dim=-1) / torch.pdist(old).mean()


changes = {
    "mean of the region": moved(mean[0], mean[1]),
    "HGA": moved(before.tokens, after.tokens),
    "HGA with a mask": moved(before.tokens, masked.tokens),
}
hidden = (weights * covered_patches.flatten()).sum(-1)
for title, change in changes.items():
    opened, closed = change[hidden < 0.1].mean(), change[hidden > 0.9].mean()
    print(f"{title:20} open regions {opened:.2f}, covered ones {closed:.2f}")
for title, output in (("clear", before), ("covered", after)):
    share = output.attention.mean(0)[:, ~usable].sum(-1)[hidden < 0.1].mean()
    print(f"{title}: {100 * share:.0f} % of what open regions attend to is the place of the cover")

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 4.6), width_ratios=[1, 1.25], layout="constrained"
)
names = [name.replace("_", " ") for name in to_patches.region_names]
draw_regions(covered, weights, (16, 16), names, labels="none", ax=left)
left.set_title("the cover and the regions")
order = hidden.argsort().tolist()
for (title, change), marker, color in zip(
    changes.items(), "osD", ("tab:gray", "tab:orange", "tab:blue"), strict=True
):
    right.plot(change[order], range(13), marker, color=color, markersize=6, label=title)
right.set_yticks(range(13), [f"{names[m]}, {100 * hidden[m]:.0f} % covered" for m in order])
right.tick_params(axis="y", labelsize=8)
right.set(title="how far its token moves", xlabel="distances between regions", xlim=(-0.05, None))
right.legend(fontsize=8, loc="lower right")
figure.suptitle("A covered mouth and the tokens of thirteen regions")
plt.show()
