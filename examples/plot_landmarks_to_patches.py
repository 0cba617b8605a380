"""
Which patches belong to which part of a face?
=============================================

A vision transformer has a grid of patches, not of mouths and brows. Landmarks give those: the
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
from mmau.landmarks import IBUG68
from mmau.media import FACE_DETECTORS, FaceTracker, align_faces
from mmau.media.mediapipe import MediaPipeLandmarks
from mmau.plot import draw_attention, draw_landmarks, draw_regions

with get_sample_data("grace_hopper.jpg") as stream:  # US Navy, public domain
    photograph = plt.imread(stream, format="jpg")
face = FaceTracker(FACE_DETECTORS.create("mediapipe"), MediaPipeLandmarks()).update(photograph)
crops, landmarks = align_faces([photograph], face.landmarks[None], 224)
points = torch.from_numpy(landmarks[0])

# %%
# [LandmarkToPatch][mmau.LandmarkToPatch] gives one row of weights per region. A row sums to one, so
# its product with the patch tokens is the mean of the region. A patch under five landmarks counts
# once.

to_patches = LandmarkToPatch("ibug68")
regions = to_patches(points, grid_size=(16, 16), image_size=(224, 224))
for name, row in zip(to_patches.region_names, regions.weights, strict=True):
    print(f"{name:20} {int((row > 0).sum()):2} patches")

# %%
# Diamonds are derived points: iBUG has none on cheeks and forehead. Regions may share a patch: the
# corner of the mouth is also part of a lip. Such a patch is striped.

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
x0, y0, x1, y1 = face.box
margin = 0.6 * (x1 - x0)
draw_landmarks(photograph, face.landmarks, ax=left)
left.set(xlim=(x0 - margin, x1 + margin), ylim=(y1 + margin, y0 - margin), title="68 landmarks")
draw_landmarks(crops[0], points, scheme=IBUG68, ax=middle).set_title("upright, by region")
draw_regions(crops[0], regions.weights, (16, 16), to_patches.region_names, ax=right)
right.set_title("their patches, 16 x 16")
figure.suptitle("Landmarks on a photograph and the patches of thirteen regions of the face")
plt.show()

# %%
# The paper takes the patches under the landmarks. `mode` offers three other readings of a region:
# the bounding box, the filled convex hull, and a blur that has a gradient with respect to the
# landmarks. `subset` picks regions by name.

some = IBUG68.subset(["left_brow", "right_cheek", "lower_lip"])
figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
for axis, mode in zip(axes[:3], ("points", "bbox", "hull"), strict=True):
    weights, _ = LandmarkToPatch(some, mode=mode)(points, (16, 16), (224, 224))
    draw_regions(crops[0], weights, (16, 16), some.region_names, labels="none", ax=axis)
    axis.set_title(f'mode="{mode}"')
blur, _ = LandmarkToPatch(some, mode="gaussian", sigma=0.8)(points, (16, 16), (224, 224))
draw_attention(crops[0], blur[1].view(16, 16), ax=axes[3]).set_title('mode="gaussian", the cheek')
figure.suptitle("Four readings of the left brow, the right cheek and the lower lip")
plt.show()
