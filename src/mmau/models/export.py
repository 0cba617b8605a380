"""Parts of a trained detector for runtimes without Python: ONNX, and `torch.export`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmau._checks import check_range
from mmau._files import atomic_write
from mmau._optional import require
from mmau.models.detector import AUDetector
from mmau.modules import HGA


class _RegionTokens(nn.Module):
    """HGA with one tensor as output, which is all that a runtime needs."""

    def __init__(self, hga: HGA) -> None:
        super().__init__()
        self.hga = hga

    def forward(self, patch_tokens: Tensor, weights: Tensor) -> Tensor:
        tokens: Tensor = self.hga(patch_tokens, weights).tokens
        return tokens


def export_hga_onnx(hga: HGA, path: str | Path, *, num_patches: int, num_regions: int) -> Path:
    """Write HGA as an ONNX model with any number of frames.

    Inputs `patch_tokens` `(n, p, d_visual)` and `weights` `(n, m, p)`, output `region_tokens`
    `(n, m, d_model)`, all float32; `n` is free.

    Args:
        hga: The module.
        path: Where to write; complete or absent.
        num_patches: Patches `p` of the grid.
        num_regions: Regions `m`.

    Returns:
        The path.

    Raises:
        MissingDependencyError: If onnx or onnxscript is not installed.
    """
    check_range("num_patches", num_patches, 1)
    check_range("num_regions", num_regions, 1)
    inputs = (
        torch.zeros(2, num_patches, hga.d_visual),
        torch.full((2, num_regions, num_patches), 1.0 / num_patches),
    )
    return _export(_RegionTokens(hga), inputs, path, ("patch_tokens", "weights"), "region_tokens")


def export_head_onnx(detector: AUDetector, path: str | Path) -> Path:
    """Write the classification head as an ONNX model with any number of frames.

    Input `hidden` `(n, d_model)`, what the temporal model returns; output `logits` `(n, c)`, both
    float32; `n` is free. What the logits mean, and the thresholds, are in `calibration.json`.

    Args:
        detector: The detector.
        path: Where to write; complete or absent.

    Returns:
        The path.

    Raises:
        MissingDependencyError: If onnx or onnxscript is not installed.
    """
    head = nn.Sequential(detector.head_norm, detector.head)
    return _export(head, (torch.zeros(2, detector.d_model),), path, ("hidden",), "logits")


def export_temporal(
    temporal: nn.Module, *, d_model: int, d_audio: int | None = None, num_frames: int = 16
) -> torch.export.ExportedProgram:
    """Capture a temporal model for `torch.export`, with any number of frames.

    ONNX has no operator for the recurrence of a scan; this program runs wherever torch does,
    without the library's Python code, and can be saved with `torch.export.save`.

    Args:
        temporal: A temporal model.
        d_model: Width of the visual vectors.
        d_audio: Width of the audio vectors, or `None` for a model without audio.
        num_frames: Frames of the example that is traced, at least 2.

    Returns:
        The program, called with `(visual (1, t, d_model), audio (1, t, d_audio) or None)`.

    Examples:
        >>> from mmau.modules import AGSSM
        >>> program = export_temporal(AGSSM(8, 4).eval(), d_model=8, d_audio=4)
        >>> out, state = program.module()(torch.zeros(1, 50, 8), torch.zeros(1, 50, 4))
        >>> out.shape
        torch.Size([1, 50, 8])
    """
    check_range("num_frames", num_frames, 2)
    frames = torch.export.Dim("t", min=1)
    visual = torch.zeros(1, num_frames, d_model)
    audio = None if d_audio is None else torch.zeros(1, num_frames, d_audio)
    given = (visual,) if audio is None else (visual, audio)
    with torch.no_grad():
        return torch.export.export(
            temporal, given, dynamic_shapes=tuple({1: frames} for _ in given)
        )


def _export(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: str | Path,
    input_names: Sequence[str],
    output_name: str,
) -> Path:
    for library in ("onnx", "onnxscript"):
        require(library, purpose="exporting to ONNX", extra="export")
    path = Path(path)
    frames = torch.export.Dim("n", min=1)
    with warnings.catch_warnings(), torch.no_grad(), atomic_write(path) as partial:
        # The exporter's own notices about versions of operators; the result is checked by tests.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(module).eval().cpu().float(),
            tuple(inputs),
            str(partial),
            input_names=list(input_names),
            output_names=[output_name],
            dynamic_shapes=tuple({0: frames} for _ in inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path
