"""The selective scan: one function, several interchangeable implementations.

`reference` reads like the paper and judges all others; `chunked` is what runs by default. Another
package can add one through the entry-point group `mmau.scan_backends`.
"""

from __future__ import annotations

from mmau.scan.api import resolve_scan_backend, selective_scan
from mmau.scan.backend import SCAN_BACKENDS, GatedScanFunction, ScanBackend, ScanFunction
from mmau.scan.reference import euler, half_life, zoh

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
