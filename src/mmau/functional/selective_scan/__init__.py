"""The selective scan: one function, several interchangeable implementations.

`_reference` reads like the paper and judges all others; `_chunked` is what runs by default. A
package of yours can add one through the entry-point group `mmau.scan_backends`.
"""

from __future__ import annotations

from mmau.functional.selective_scan._api import resolve_scan_backend, selective_scan
from mmau.functional.selective_scan._backend import (
    SCAN_BACKENDS,
    GatedScanFunction,
    ScanBackend,
    ScanFunction,
)
from mmau.functional.selective_scan._discretize import euler, half_life, zoh

__all__ = [
    "SCAN_BACKENDS",
    "GatedScanFunction",
    "ScanBackend",
    "ScanFunction",
    "euler",
    "half_life",
    "resolve_scan_backend",
    "selective_scan",
    "zoh",
]
