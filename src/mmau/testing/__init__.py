"""What a package that extends mmau runs on its own components."""

from __future__ import annotations

from mmau.scan.contract import check_scan_backend

__all__ = ["check_scan_backend"]
