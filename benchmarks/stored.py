"""Stored runs: reading them, and their results by group."""

import json
from pathlib import Path

from benchmarks.descriptions import DESCRIPTIONS
from engine.errors import InputError

RENAMED = {  # keys of runs that were stored before, and what they are called now
    "pictures_per_second": "images_per_second",
    "joules_per_picture": "joules_per_image",
    "first picture": "first image",
    "way": "curve",
    "seconds drawing": "seconds text-to-image",
    "± seconds drawing": "± seconds text-to-image",
    "seconds telling": "seconds image-to-text",
    "± seconds telling": "± seconds image-to-text",
}


def read(file: Path) -> dict:
    """A stored run: pytest-benchmark's JSON, or an experiment's. Raises InputError about "results" if it is neither."""
    remedy = "give a file of `pytest benchmarks/ --benchmark-json FILE`"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("results", file, remedy, f"cannot be read as JSON ({error})") from None
    is_run = isinstance(stored, dict) and (
        stored.get("experiment") in DESCRIPTIONS or "engine" in stored.get("machine_info", {})
    )
    if not is_run:
        raise InputError("results", file, remedy, "is not a run of these benchmarks")
    return _renamed(stored)


def _renamed(stored):
    """A value of JSON with the keys that it would have now."""
    if isinstance(stored, dict):
        return {RENAMED.get(key, key): _renamed(value) for key, value in stored.items()}
    return [_renamed(value) for value in stored] if isinstance(stored, list) else stored


def rows_by_group(run: dict) -> dict[str, list[dict]]:
    """A run's results by group, fastest first: what was recorded, the statistics and the share of the ceilings."""
    groups: dict[str, list[dict]] = {}
    ceilings = run["machine_info"]["engine"]["ceilings"]
    for b in run["benchmarks"]:
        row = b["extra_info"] | b["stats"]
        if "flops_per_second" in row:
            row["percent_of_matmul"] = 100 * row["flops_per_second"] / ceilings[row["dtype"]]
        if "bytes_per_second" in row:
            row["percent_of_copy"] = 100 * row["bytes_per_second"] / ceilings["copy"]
        groups.setdefault(b["group"], []).append(row)
    return {group: sorted(rows, key=lambda row: row["median"]) for group, rows in groups.items()}
