"""Features of a video of any length to logits, with memory that does not grow with it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mmau._checks import check_mask, check_range, check_shapes
from mmau.models import AUDetector

__all__ = ["LogitStream"]


class LogitStream:
    """Classify a video piece by piece.

    With a causal temporal model the state is carried from piece to piece, every frame comes out at
    once, and the result is that of one pass over the whole video, to rounding. A causal transformer
    without `window` keeps keys and values of all frames as its state, so its memory grows.

    A model that is not causal reads overlapping windows instead and each frame is taken from the
    one window that owns it, at least `margin_frames` from both ends of it. A video of up to
    `window_frames` frames is read in one pass; in a longer one a frame does not see further than
    its window.

    Args:
        detector: The detector, in eval mode.
        window_frames: Frames that a model which is not causal sees at once.
        margin_frames: Frames at either end of a window that another window owns.

    Raises:
        ValueError: If a window has no middle.

    Examples:
        >>> from mmau.models import Component, DetectorConfig, build_detector
        >>> config = DetectorConfig(
        ...     visual=Component("tiny"), audio=None, d_region=32, num_heads=4, d_model=32,
        ...     crop_size=64,
        ... )
        >>> stream = LogitStream(build_detector(config).eval())
        >>> pieces = [stream.push(torch.zeros(n, 32)) for n in (3, 1, 5)]
        >>> [len(piece) for piece in pieces], len(stream.finish())
        ([3, 1, 5], 0)
    """

    def __init__(
        self, detector: AUDetector, *, window_frames: int = 2048, margin_frames: int = 512
    ) -> None:
        check_range("margin_frames", margin_frames, 0)
        if window_frames <= 2 * margin_frames:
            raise ValueError(
                "`window_frames` must be more than twice `margin_frames`, or a window owns "
                f"nothing; got {window_frames} and {margin_frames}."
            )
        self.detector = detector
        self.causal = bool(cast("Any", detector.temporal).causal)
        self.window_frames = window_frames
        self.margin_frames = margin_frames
        self._state: Any = None
        # Frames that wait for their window: the two streams, and where there is sound.
        self._waiting: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._left = 0  # frames at the head of those that an earlier window owned

    @torch.no_grad()
    def push(
        self, visual: Tensor, audio: Tensor | None = None, audio_mask: Tensor | None = None
    ) -> Tensor:
        """Take the next frames.

        Args:
            visual: `(t, d_model)`, from `AUDetector.merge_regions`; may be empty.
            audio: `(t, d_guide)`, from `AUDetector.align_audio`; `None` where there is no sound.
            audio_mask: `(t)` bool, where there is sound; everywhere if left out.

        Returns:
            `(u, c)`, logits of the next frames that are ready: these if the model is causal.

        Raises:
            TypeError: If the mask is not bool.
            ValueError: If a shape does not fit, or sound is given to a detector without.
        """
        if self.detector.d_guide is None and audio is not None:
            raise ValueError("this detector was built without an audio encoder; leave sound out.")
        check_shapes(
            sizes={"d": self.detector.d_model, "a": self.detector.d_guide or 0},
            visual=(visual, "t d"),
            audio=(audio, "t a"),
            audio_mask=(audio_mask, "t"),
        )
        check_mask("audio_mask", audio_mask)
        if not len(visual):
            return self._nothing(visual)
        if self.causal:
            logits, self._state = self.detector.classify(
                visual[None],
                None if audio is None else audio[None],
                audio_mask=None if audio_mask is None else audio_mask[None],
                state=self._state,
            )
            return logits[0]
        self._append(visual, audio, audio_mask)
        ready = []
        while self._num_waiting() > self.window_frames:
            ready.append(self._run_window(last=False))
        return torch.cat(ready) if ready else self._nothing(visual)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Say that there are no more frames.

        Returns:
            `(u, c)`, logits of the frames that were not ready; none if the model is causal.
        """
        if self._num_waiting() > self._left:
            return self._run_window(last=True)
        return self._nothing(self.detector.no_face)

    # ------------------------------------------------------------------ windows
    def _nothing(self, like: Tensor) -> Tensor:
        return like.new_zeros(0, len(self.detector.au_names))

    def _num_waiting(self) -> int:
        return 0 if self._waiting is None else len(self._waiting[0])

    def _append(self, visual: Tensor, audio: Tensor | None, audio_mask: Tensor | None) -> None:
        if self.detector.d_guide is not None:
            # Pieces with and without sound may share a window.
            if audio is None:
                audio = visual.new_zeros(len(visual), self.detector.d_guide)
                audio_mask = torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
            elif audio_mask is None:
                audio_mask = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        new = (visual, audio, audio_mask)
        self._waiting = (
            new if self._waiting is None else cast("Any", tuple(map(_joined, self._waiting, new)))
        )

    def _run_window(self, *, last: bool) -> Tensor:
        waiting = cast("tuple[Tensor, Tensor | None, Tensor | None]", self._waiting)
        size = self._num_waiting() if last else self.window_frames
        visual, audio, audio_mask = (
            None if part is None else part[None, :size] for part in waiting
        )
        logits, _ = self.detector.classify(cast("Tensor", visual), audio, audio_mask=audio_mask)
        end = size if last else size - self.margin_frames
        owned = logits[0, self._left : end]
        keep_from = end if last else end - self.margin_frames
        self._waiting = cast(
            "Any", tuple(None if part is None else part[keep_from:] for part in waiting)
        )
        self._left = end - keep_from
        return owned


def _joined(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    return None if before is None or after is None else torch.cat([before, after])
