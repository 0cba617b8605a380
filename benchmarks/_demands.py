"""The demands that the scan has to meet, and the cases in which something else is better."""

from __future__ import annotations

import math

from _accuracy import differences, errors
from _measure import HERE, peak_alone
from _peers import MAMBA_LOOP, PSCAN, Scan
from _report import Row

OURS = ("chunked", "compiled")


def demands(scans: dict[str, Scan], cases: list[Row], lengths: list[Row], quick: bool) -> list[Row]:
    """Hold what was measured against what was asked for, for each of our backends."""
    rows: list[Row] = []
    sizes = {row["case"]: row["size"] for row in cases}

    def case(name: str, what: str, scan: str) -> float:
        row = next(r for r in cases if r["case"] == name and r["what"].startswith(f"{what},"))
        return float(row[scan])

    def time_at(t: int, what: str, scan: str) -> float:
        return float(next(r[scan] for r in lengths if (r["frames"], r["what"]) == (t, what)))

    def add(what: str, demand: str, measured: dict[str, float]) -> None:
        """Add a row; `demand` is `">= 7"`, `"<= 0.03"` or `"0.9..1.1"`."""
        if ".." in demand:
            low, high = (float(word) for word in demand.split(".."))
        elif demand.startswith(">="):
            low, high = float(demand[2:]), math.inf
        else:
            low, high = -math.inf, float(demand[2:])
        row: Row = {"what": what, "demand": demand}
        for name, value in measured.items():
            row |= {name: value, f"{name} met": "yes" if low <= value <= high else "MISSED"}
        rows.append(row)

    def faster(name: str, what: str, demand: str, peer: str = PSCAN) -> None:
        if peer in scans and name in sizes:
            ratio = {own: case(name, what, peer) / case(name, what, own) for own in mine}
            add(f"{tuple(sizes[name].values())} {what}, times faster than {peer}", demand, ratio)

    def smaller(name: str, demand: str) -> None:
        if PSCAN in scans and name in sizes:
            what = "peak memory"
            part = {own: case(name, what, own) / case(name, what, PSCAN) for own in mine}
            add(f"{tuple(sizes[name].values())} {what} as a part of {PSCAN}", demand, part)

    mine = [name for name in OURS if name in scans]
    faster("long clips", "forward", ">= 7")
    faster("long clips", "forward+backward", ">= 6.5")
    smaller("long clips", "<= 0.03")
    faster("a very long clip", "forward+backward", ">= 6")
    smaller("a very long clip", "<= 0.05")
    faster("the paper's batch", "forward+backward", ">= 2.5")
    faster("the paper's batch", "forward+backward", ">= 30", MAMBA_LOOP)
    smaller("the paper's batch", "<= 0.06")
    faster("the smallest", "forward", ">= 1.0")
    faster("the smallest", "forward+backward", ">= 1.0")
    last = max(row["frames"] for row in lengths)
    for what in ("forward", "forward+backward"):
        slope = {
            own: math.log(time_at(last, what, own) / time_at(1024, what, own))
            / math.log(last / 1024)
            for own in mine
        }
        add(f"slope of {what} between 1024 and {last} frames", "0.9..1.1", slope)
        above = {own: time_at(1025, what, own) / time_at(1024, what, own) for own in mine}
        add(f"{what} of 1025 frames over 1024", "<= 1.15", above)
    for t in (4096,) if quick else (4096, 16384, 65536):
        size = {"b": 1, "d": 256, "n": 16, "t": t}
        output = size["d"] * t * 4 / 2**20
        script = str(HERE / "selective_scan.py")
        beyond = {
            own: peak_alone(script, {"name": own, "size": size, "backward": False}) - output
            for own in mine
        }
        add(f"MB of a forward without gradients beyond its output, {t} frames", "<= 8", beyond)
    found = errors(mine)
    for what, label, demand in (
        ("output", "output, step 1e-6..20", "<= 2e-6"),
        ("gradients inside", "gradients, step 1e-4..1", "<= 5e-6"),
        ("gradients outside", "gradients, step 1e-6..1e-5 and 5..20", "<= 5e-5"),
    ):
        add(f"largest fp32 error of {label}, against float64", demand, found[what])
    changed = {own: differences(own) for own in mine}
    add("largest change by cutting, streaming, padding", "<= 0", changed)
    return rows


def losses(cases: list[Row], layers: list[Row]) -> list[str]:
    """Say where something else is faster than the scan that runs by default."""
    found = []
    for row in cases:
        for name, value in row.items():
            if isinstance(value, float) and name not in OURS and value < row["chunked"]:
                ratio = row["chunked"] / value
                size = tuple(row["size"].values())
                found.append(f"{row['what'].split(',')[0]} at {size}: {name} {ratio:.1f}x less")
    for row in layers:
        for name in ("TCN block", "LSTM", "GRU", "attention"):
            if row[name] < row["AGSSM"]:
                ratio = row["AGSSM"] / row[name]
                where = f"width {row['width']}, {row['frames']} frames"
                found.append(f"{row['what']} of a layer, {where}: {name} {ratio:.1f}x less")
    return found
