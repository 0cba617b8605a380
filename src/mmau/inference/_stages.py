"""Where the time of a prediction goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["STAGES", "StageTimes"]

STAGES = ("decode", "detect", "encode", "sound", "temporal")


@dataclass
class StageTimes:
    """Seconds spent in each stage, added up over one or more videos.

    Examples:
        >>> times = StageTimes()
        >>> times.seconds["decode"], times.num_frames = 0.5, 100
        >>> print(times.render())
        decode 200 frames/s (100 %)
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Wall time of each stage: decoding, finding faces and landmarks (with the crops), encoding
    the crops, encoding the sound, and the temporal model."""
    num_frames: int = 0
    """Frames that went through."""
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    """What `during` reads, in seconds; `time.process_time` for CPU time."""

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage.

        Args:
            stage: One of `STAGES`.

        Yields:
            Nothing.
        """
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[stage] += self.clock() - start

    def add(self, other: StageTimes) -> None:
        """Add what was measured elsewhere.

        Args:
            other: For example, of another process.
        """
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self.num_frames += other.num_frames

    def render(self) -> str:
        """Say how fast each stage was and what share of the time it took.

        Returns:
            One line, such as `decode 900 frames/s (10 %), detect 100 frames/s (90 %)`.
        """
        total = sum(self.seconds.values())
        return ", ".join(
            f"{stage} {self.num_frames / seconds:.0f} frames/s ({seconds / total:.0%})".replace(
                "%)", " %)"
            )
            for stage, seconds in self.seconds.items()
            if seconds > 0
        )
