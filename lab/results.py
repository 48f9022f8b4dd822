"""What the commands of lab share: flags, tables, numbers on file, mistakes in one line (ours)."""

import argparse
import json
import os
import subprocess
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

from runs import InputError
from runs import run_command  # noqa: F401: for the commands of lab


def check_ranges(flags: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Raise InputError that names the first flag outside its (lowest, highest)."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(flags, name) <= high:
            flag = f"--{name} {getattr(flags, name)}".replace("_", "-")
            raise InputError(f"{flag}: give a number from {low} to {high}")


def report(path: Path, flags: argparse.Namespace, found: dict) -> None:
    """Print the tables (lists of rows) and numbers in `found`, and write all of it as JSON."""
    for name, value in found.items():
        if isinstance(value, list):
            print_table(value)
        elif not isinstance(value, dict):
            print(f"{name}: {value}")
    contents = json.dumps({"flags": vars(flags), "commit": commit(), **found})
    contents = json.loads(contents, parse_constant=lambda name: None)  # NaN, Infinity: not JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")
    print(f"numbers: {path}")


def print_table(rows: list[dict]) -> None:
    """Print rows of the same keys under these, numbers on the right of their columns."""
    formats = {float: "{:,.3f}", int: "{:,}"}
    table = [[*rows[0]]] if rows else []
    for row in rows:
        table.append([formats.get(type(value), "{}").format(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean of a few values and its 95 % interval by Student's t; one value has none."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, mean, mean
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[min(n, 10) - 2]
    half = t * (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
    return mean, mean - half, mean + half


def commit() -> str | None:
    """Return the commit of this code, "-dirty" if files have changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
