"""The selective scan: one function, several interchangeable implementations.

`reference` reads like the paper and judges all others; `chunked` is what runs by default. Another
package can add one through the entry-point group `mmau.scan_backends`.
"""

from __future__ import annotations

from mmau.scan.api import selective_scan
from mmau.scan.backend import SCAN_BACKENDS, ScanBackend
from mmau.scan.reference import half_life

__all__ = [
    "SCAN_BACKENDS",
    "ScanBackend",
    "half_life",
    "selective_scan",
]
