"""From a prepared trial to rows of patch tokens or of region tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mmau._checks import check_range
from mmau.data._feature_cache_source import FeatureSource
from mmau.data.prepared_trial import PreparedTrial, load_trial
from mmau.functional.region_pooling import region_pooling

__all__ = ["module_fingerprint", "token_rows"]


Encoder = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]
RegionMapper = Callable[..., tuple[Tensor, Tensor]]


def module_fingerprint(module: nn.Module) -> str:
    """Sum up the weights of a module, so that features are stale as soon as it is trained.

    Args:
        module: The encoder.

    Returns:
        sha256 of names, types, shapes and values of its parameters and buffers.

    Examples:
        >>> linear = nn.Linear(2, 2)
        >>> before = module_fingerprint(linear)
        >>> _ = linear.weight.data.add_(1)
        >>> before == module_fingerprint(linear)
        False
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module that keeps some
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def token_rows(
    source: FeatureSource,
    *,
    encoder: Encoder,
    regions: RegionMapper | None = None,
    frames_per_chunk: int = 64,
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Encode a prepared trial, chunk by chunk: all patch tokens, or their means by region.

    Frames without a face are not encoded: their tokens are zero and `valid` or `region_valid` is
    False. Memory is that of one chunk.

    Args:
        source: A source whose `path` is a prepared trial.
        encoder: Images `(b, 3, h, w)` in [0, 1] to patch tokens `(b, p, d)` and their grid.
        regions: Landmarks, grid and image size to weights `(b, m, p)` and validity `(b, m)`, such
            as `LandmarkToPatch()`; left out, all tokens are given.
        frames_per_chunk: Frames at a time.
        device: Where the encoder is.

    Yields:
        `patch_tokens` and `valid`, or `regions`, `overall` and `region_valid`: the rows of
        `FeatureLayout.patches` and `FeatureLayout.regions`.

    Raises:
        ValueError: If the encoder is in training mode, in which it would be noisy.
        CacheError: If the file is missing or corrupt.
    """
    check_range("frames_per_chunk", frames_per_chunk, 1)
    if isinstance(encoder, nn.Module) and encoder.training:
        raise ValueError(
            "the encoder is in training mode, so its features would be noisy: call .eval() first."
        )
    trial = load_trial(source.path, memory_map=True)
    for start in range(0, trial.num_frames, frames_per_chunk):
        yield _rows(trial, slice(start, start + frames_per_chunk), encoder, regions, device)


def _rows(
    trial: PreparedTrial,
    part: slice,
    encoder: Encoder,
    regions: RegionMapper | None,
    device: str | torch.device,
) -> dict[str, Tensor]:
    valid = np.asarray(trial.valid[part])
    # A chunk without any face is encoded once, only to learn the shapes.
    kept = np.flatnonzero(valid) if valid.any() else np.zeros(1, dtype=np.int64)
    crops = torch.from_numpy(np.ascontiguousarray(trial.crops[part][kept])).to(device)
    tokens, grid_size = encoder(crops.movedim(-1, 1).float() / 255)
    where = torch.from_numpy(kept)
    seen = torch.from_numpy(valid.copy())
    if regions is None:
        return {"patch_tokens": _spread(tokens, where, seen), "valid": seen}
    landmarks = torch.from_numpy(np.ascontiguousarray(trial.landmarks[part][kept])).to(device)
    weights, known = regions(landmarks, grid_size, tuple(crops.shape[1:3]))
    local, overall = region_pooling(tokens, weights)
    return {
        "regions": _spread(local * known[..., None], where, seen),
        "overall": _spread(overall, where, seen),
        "region_valid": _spread(known, where, seen),
    }


def _spread(rows: Tensor, where: Tensor, seen: Tensor) -> Tensor:
    """Put rows at the frames that they belong to; zero or False everywhere else."""
    rows = rows.cpu()
    full = rows.new_zeros((len(seen), *rows.shape[1:]))
    full[where] = rows
    full[~seen] = 0
    return full
