"""
Which patches belong to which part of a face?
=============================================

A vision transformer sees a grid of patches and knows nothing of mouths and brows. Landmarks do: the
patches under the landmarks of a region are that region, whatever the pose.
"""

# %%
# MediaPipe finds the face and its mesh; the mesh is reduced to the 68 points of iBUG, and the face
# is turned upright by points that no expression moves ([FaceTracker][mmau.media.FaceTracker],
# [align_faces][mmau.media.align_faces]).

import matplotlib.pyplot as plt
import torch
from matplotlib.cbook import get_sample_data

from mmau import LandmarkToPatch
from mmau.media import FACE_DETECTORS, FaceTracker, align_faces
from mmau.media.mediapipe_faces import MediaPipeLandmarks

with get_sample_data("grace_hopper.jpg") as stream:  # US Navy, public domain
    photograph = plt.imread(stream, format="jpg")
face = FaceTracker(FACE_DETECTORS.create("mediapipe"), MediaPipeLandmarks()).update(photograph)
crops, landmarks = align_faces([photograph], face.landmarks[None], 224)

# %%
# [LandmarkToPatch][mmau.LandmarkToPatch] gives one row of weights per region. A row sums to one, so
# its product with the patch tokens is the mean of the region. A patch under five landmarks counts
# once.

to_patches = LandmarkToPatch("ibug68")
regions = to_patches(torch.from_numpy(landmarks[0]), grid_size=(16, 16), image_size=(224, 224))
masks = (regions.weights > 0).view(-1, 16, 16)
for name, mask in zip(to_patches.region_names, masks, strict=True):
    print(f"{name:20} {int(mask.sum()):2} patches")

# %%
# Regions may share a patch: the corner of the mouth is also part of a lip. Such a patch is striped.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.4))
x0, y0, x1, y1 = face.box
margin = 0.6 * (x1 - x0)
left.imshow(photograph)
left.scatter(*face.landmarks.T, s=5, color="cyan")
left.set(xlim=(x0 - margin, x1 + margin), ylim=(y1 + margin, y0 - margin), title="68 landmarks")
left.axis("off")
right.imshow(crops[0].mean(axis=-1), extent=(0, 16, 16, 0), cmap="gray")
colours = [*plt.get_cmap("Set1").colors[:8], "cyan", "navy", "gold", "lime", "teal"]
for row, column in masks.any(0).nonzero().tolist():
    owners = masks[:, row, column].nonzero().flatten().tolist()
    for stripe, owner in enumerate(owners):
        place = (column + stripe / len(owners), row)
        patch = plt.Rectangle(place, 1 / len(owners), 1, color=colours[owner], alpha=0.5, lw=0)
        right.add_patch(patch)
for colour, name in zip(colours, to_patches.region_names, strict=True):
    right.scatter([], [], marker="s", color=colour, label=name.replace("_", " "))
right.set(title="their patches, 16 x 16", xticks=range(17), yticks=range(17))
right.tick_params(labelbottom=False, labelleft=False, length=0)
right.grid(color="white", linewidth=0.4, alpha=0.6)
right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
figure.suptitle("Landmarks on a photograph and the patches of thirteen regions of the face")
plt.show()
