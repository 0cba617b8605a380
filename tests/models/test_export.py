"""What is exported computes the same, for numbers of frames that the exporter never saw."""

import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmau.models import (
    Component,
    DetectorConfig,
    build_detector,
    export_head_onnx,
    export_hga_onnx,
    export_temporal,
)
from mmau.modules import HGA, TEMPORAL_MODELS
from mmau.registry import MissingDependencyError


def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path))


def test_hga_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    hga = HGA(24, 16, 4).train()
    ours = session(export_hga_onnx(hga, tmp_path / "hga.onnx", num_patches=16, num_regions=5))
    assert hga.training  # exported from a copy
    for n in (1, 3, 50):
        tokens, weights = torch.randn(n, 16, 24), torch.rand(n, 5, 16).softmax(-1)
        given = {"patch_tokens": tokens.numpy(), "weights": weights.numpy()}
        (found,) = ours.run(["region_tokens"], given)
        expected = hga.eval()(tokens, weights).tokens.detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["hga.onnx"]


def test_the_head_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    config = DetectorConfig(
        visual=Component("tiny", {"hidden_size": 16, "num_layers": 1, "image_size": 32}),
        audio=None,
        d_region=16,
        num_heads=4,
        d_model=16,
        crop_size=32,
    )
    detector = build_detector(config)
    ours = session(export_head_onnx(detector, tmp_path / "head.onnx"))
    hidden = torch.randn(7, 16)
    (found,) = ours.run(["logits"], {"hidden": hidden.numpy()})
    expected = detector.head(detector.head_norm(hidden)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(TEMPORAL_MODELS))
@pytest.mark.parametrize("d_audio", [None, 4])
def test_temporal_models_for_any_number_of_frames(name, d_audio):
    model = TEMPORAL_MODELS.create(name, 8, d_audio).eval()
    program = export_temporal(model, d_model=8, d_audio=d_audio).module()
    for t in (1, 40):
        given = [torch.randn(1, t, width) for width in (8, d_audio) if width]
        assert_close(program(*given)[0], model(*given)[0])


def test_without_the_library_it_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        MissingDependencyError, match=r"exporting to ONNX needs 'onnx'.*mmau\[export"
    ):
        export_hga_onnx(HGA(8, 8, 2), tmp_path / "x.onnx", num_patches=4, num_regions=2)
    assert not list(tmp_path.iterdir())
