"""
Where can a region of the face look?
====================================

The mean of the patches under the mouth is blind to the rest of the face. In HGA that mean becomes a
query, and every patch of the face may answer. The picture shows both sets of weights.
"""

# %%
# **Nothing here has been trained.** The tokens are the pixels of each patch, the weights of the
# attention are as they were drawn. So the map says where the mouth *can* look, and how even that
# look is before training; it does not say what matters for an Action Unit.

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.cbook import get_sample_data

from mmau import HGA, LandmarkToPatch
from mmau.media import FACE_DETECTORS, FaceTracker, align_faces
from mmau.media.mediapipe_faces import MediaPipeLandmarks

with get_sample_data("grace_hopper.jpg") as stream:  # US Navy, public domain
    photograph = plt.imread(stream, format="jpg")
face = FaceTracker(FACE_DETECTORS.create("mediapipe"), MediaPipeLandmarks()).update(photograph)
crops, landmarks = align_faces([photograph], face.landmarks[None], 224)

# %%
# A patch of 14 x 14 pixels with 3 colours is a token of width 588. The landmarks give the weights.

image = torch.from_numpy(crops[0]).float() / 255
tokens = rearrange(image - image.mean(), "(h a) (w b) c -> (h w) (a b c)", a=14, b=14)
to_patches = LandmarkToPatch("ibug68")
regions = to_patches(torch.from_numpy(landmarks[0]), grid_size=(16, 16), image_size=(224, 224))

torch.manual_seed(0)
hga = HGA(d_visual=588, d_model=96, num_heads=8)
with torch.no_grad():
    output = hga(tokens, regions.weights, return_attention=True)
print("one token per region:", tuple(output.tokens.shape))
print("attention (heads, regions, patches):", tuple(output.attention.shape))

# %%
# Relative to an even look at all 256 patches, 1 means "as much as any other patch".

mouth = to_patches.region_names.index("lower_lip")
pooled = regions.weights[mouth].view(16, 16).numpy()
looked_at = output.attention[:, mouth].mean(0).view(16, 16).numpy() * 256

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.7))
left.imshow(crops[0], extent=(0, 16, 16, 0))
left.set_title("the face, upright")
middle.imshow(crops[0], extent=(0, 16, 16, 0), alpha=0.35)
middle.imshow(pooled, extent=(0, 16, 16, 0), cmap="Oranges", alpha=0.75)
middle.set_title("the query: patches of the lower lip")
heat = right.imshow(looked_at, extent=(0, 16, 16, 0), cmap="viridis")
right.set_title("where it looks, untrained")
figure.colorbar(heat, ax=right, shrink=0.8, label="times the even share")
for axis in (left, middle, right):
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
figure.suptitle("Attention of one facial region, before any training")
plt.show()
