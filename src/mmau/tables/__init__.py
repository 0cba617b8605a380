"""Action Unit tables of other programs, and labels in the conventions of other data sets."""

from __future__ import annotations

from mmau.tables.formats import (
    ForeignAUTable,
    read_openface,
    read_pyfeat,
    write_openface,
    write_pyfeat,
)
from mmau.tables.label_conventions import NumberedLabels, read_bp4d, read_disfa

__all__ = [
    "ForeignAUTable",
    "NumberedLabels",
    "read_bp4d",
    "read_disfa",
    "read_openface",
    "read_pyfeat",
    "write_openface",
    "write_pyfeat",
]
