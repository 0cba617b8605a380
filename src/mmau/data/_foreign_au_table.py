"""A table of Action Units in the terms of other programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmau.action_units import AU_NAMES

__all__ = ["ForeignAUTable", "PredictedTable"]

_ROW_COLUMNS = ("frames", "face_ids", "timestamps", "confidence", "success")


class PredictedTable(Protocol):
    """What `from_predictions` takes; the table of `mmau.inference` is one."""

    @property
    def au_names(self) -> tuple[str, ...]:
        """Names of the columns."""
        ...

    @property
    def frames(self) -> npt.NDArray[np.int64]:
        """`(n)`, frame number, counted from 1."""
        ...

    @property
    def face_id(self) -> npt.NDArray[np.int64] | None:
        """`(n)`, which person, or `None` if there is one."""
        ...

    @property
    def timestamps(self) -> npt.NDArray[np.float64]:
        """`(n)`, seconds."""
        ...

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """`(n)`, whether a face was found."""
        ...

    @property
    def confidence(self) -> npt.NDArray[np.floating]:
        """`(n)`, in [0, 1]."""
        ...

    @property
    def probability(self) -> npt.NDArray[np.floating]:
        """`(n, c)`, in [0, 1]."""
        ...

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """`(n, c)`, the decisions."""
        ...


@dataclass(frozen=True)
class ForeignAUTable:
    """A table of another program, or for one: a row per frame and face."""

    au_names: tuple[str, ...]
    """Names of the columns, `AU1` and so on, without leading zeros."""
    frames: npt.NDArray[np.int64]
    """`(n)`, frame number, counted from 1."""
    face_ids: npt.NDArray[np.int64]
    """`(n)`, which face of the frame, counted from 0."""
    timestamps: npt.NDArray[np.float64]
    """`(n)`, seconds; NaN where the table does not say."""
    confidence: npt.NDArray[np.float64]
    """`(n)`, of the face, in [0, 1]; NaN where the table does not say."""
    success: npt.NDArray[np.bool_]
    """`(n)`, whether there was a face to judge."""
    prob: npt.NDArray[np.float64] | None = None
    """`(n, c)`, probability in [0, 1], NaN where unknown; `None` if the table has none."""
    intensity: npt.NDArray[np.float64] | None = None
    """`(n, c)`, FACS intensity 0 to 5, NaN where unknown; `None` if the table has none."""
    labels: npt.NDArray[np.int8] | None = None
    """`(n, c)`, 1, 0 or -1; `None` if the table has no decisions."""

    def __post_init__(self) -> None:
        rows = len(self.frames)
        for name in ("face_ids", "timestamps", "confidence", "success"):
            if getattr(self, name).shape != (rows,):
                raise ValueError(
                    f"`{name}` must have shape ({rows},), as `frames`; got "
                    f"{getattr(self, name).shape}."
                )
        for name in ("prob", "intensity", "labels"):
            array = getattr(self, name)
            if array is not None and array.shape != (rows, len(self.au_names)):
                raise ValueError(
                    f"`{name}` must have shape ({rows}, {len(self.au_names)}); got {array.shape}."
                )

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def from_predictions(cls, table: PredictedTable) -> ForeignAUTable:
        """Turn what a detector predicted into a table for other programs.

        Args:
            table: Predictions, such as those of an `AUPredictor`.

        Returns:
            A table with `prob` and `labels`. `success` is whether a face was found: elsewhere the
            prediction is kept, but programs that follow the formats will not use it.

        Examples:
            ```python
            table = AUPredictor.from_pretrained("checkpoint").predict("talk.mp4")
            write_openface("talk.csv", ForeignAUTable.from_predictions(table))
            ```
        """
        rows = len(table.frames)
        return cls(
            tuple(table.au_names),
            frames=np.asarray(table.frames, dtype=np.int64),
            face_ids=(
                np.zeros(rows, dtype=np.int64)
                if table.face_id is None
                else np.asarray(table.face_id, dtype=np.int64)
            ),
            timestamps=np.asarray(table.timestamps, dtype=np.float64),
            confidence=np.asarray(table.confidence, dtype=np.float64),
            success=np.asarray(table.valid, dtype=np.bool_),
            prob=np.asarray(table.probability, dtype=np.float64),
            labels=np.asarray(table.active, dtype=np.int8),
        )

    def face(self, face_id: int) -> ForeignAUTable:
        """Keep the rows of one face.

        Args:
            face_id: Which, as in `face_ids`.

        Returns:
            A table with those rows.

        Raises:
            LookupError: If there is no such face.
        """
        rows = self.face_ids == face_id
        if not rows.any():
            known = ", ".join(str(i) for i in np.unique(self.face_ids)) or "none"
            raise LookupError(f"no face {face_id} in the table; it has {known}.")
        kept = {
            name: getattr(self, name)[rows]
            for name in (*_ROW_COLUMNS, "prob", "intensity", "labels")
            if getattr(self, name) is not None
        }
        return replace(self, **kept)

    def select(
        self, name: str, au_names: Sequence[str] = AU_NAMES
    ) -> npt.NDArray[np.float64] | npt.NDArray[np.int8]:
        """Arrange the columns of one array by Action Unit.

        Args:
            name: `"prob"`, `"intensity"` or `"labels"`.
            au_names: Wanted columns, in order.

        Returns:
            `(n, c)`; NaN, or -1 for labels, in columns that the table does not have.

        Raises:
            LookupError: If the table has no such array.
        """
        array = getattr(self, name) if name in ("prob", "intensity", "labels") else None
        if array is None:
            raise LookupError(f"the table has no {name!r}.")
        fill = -1 if name == "labels" else math.nan
        wanted = np.full((len(self), len(au_names)), fill, dtype=array.dtype)
        for column, unit in enumerate(au_names):
            if unit in self.au_names:
                wanted[:, column] = array[:, self.au_names.index(unit)]
        return wanted
