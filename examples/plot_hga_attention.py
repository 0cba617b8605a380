"""
What does a region of the face attend to?
=========================================

The mean of the patches under the mouth does not depend on the rest of the face. In HGA that mean
becomes a query, which attends to every patch of the face.
"""

# %%
# **Nothing here has been trained.** The tokens are the pixels of each patch. The weights of the
# attention are as they were drawn, but for one change below. So the map shows what attention does;
# it does not say what matters for an Action Unit.

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from skimage.data import astronaut

from mmau import HGA, LandmarkToPatch
from mmau.media import FACE_DETECTORS, FaceTracker, align_faces
from mmau.media.mediapipe import MediaPipeLandmarks
from mmau.plot import draw_attention, draw_regions

photograph = astronaut()  # Eileen Collins; NASA, public domain
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
    drawn = hga(tokens, regions.weights, return_attention=True)
print("one token per region:", tuple(drawn.tokens.shape))
print("attention (heads, regions, patches):", tuple(drawn.attention.shape))

# %%
# Queries and keys drawn apart have nothing to say to each other: every patch gets about the same.
# With the projection of the keys for both, a region attends to what resembles it. Training finds
# its own measure of what belongs together.

with torch.no_grad():
    hga.to_query.weight.copy_(12 * hga.to_key.weight)
    tied = hga(tokens, regions.weights, return_attention=True)

mouth = to_patches.region_names.index("lower_lip")
query = regions.weights[mouth].view(16, 16)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
draw_regions(image, regions.weights[[mouth]], (16, 16), ["lower_lip"], labels="none", ax=left)
left.set_title("the query: patches of the lower lip")
for axis, output, title in (
    (middle, drawn, "weights as drawn: uniform attention"),
    (right, tied, "one projection for both: what is alike"),
):
    attention = output.attention[:, mouth].mean(0).view(16, 16)
    draw_attention(image, attention, query=query, colorbar=True, ax=axis).set_title(title)
figure.suptitle("Attention of one facial region, before any training")
plt.show()
