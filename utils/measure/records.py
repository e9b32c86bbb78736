"""The files of results/raw/: a record for each process that measured, and what belongs to a whole sweep.

Beside a sweep's records lie sweep.json (which settings were measured last; for each, by its key: settings,
environment and every command) and ceilings.json.  A published sweep is one zip file with the same content:

    python -m utils.measure.records results/published/h200
"""

import argparse
import dataclasses
import json
import re
import sys
import typing
import zipfile
import zlib
from pathlib import Path

from utils.measure.schema import STATUSES, Job, Record
from utils.utils import UserError, read_dict, run_main, write_json, write_whole

FIELDS = {field.name for field in dataclasses.fields(Record)}
# What a record's parts must have for a row to be made of them.
BUILD = {"seconds", "from_cache", "artefact_mb"}
CHECK = {"images", "different", "correct", "max_abs_diff", "tolerance"}
BATCH = {"batch_size", "status", "reason"}
TIMED = BATCH | {"host_ms", "enqueue_ms", "gpu_ms", "sustained", "memory_of"}
TIMED |= {"gpu_memory_mb", "torch_memory_mb", "host_memory_mb"}
RENAMED = {"beside_ms": "baseline_ms", "turns": "block_runs"}  # in records made before 2026-11-28
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that equal records make equal zips


def read_record(path: Path) -> Record | None:
    """The record in a file, or None where it is missing, was cut short, damaged or is of another kind."""
    try:
        record = Record(**{name: value for name, value in read_dict(path).items() if name in FIELDS})
    except TypeError:  # a field is missing
        return None
    if not is_valid(record):
        return None
    record.batches = [{RENAMED.get(k, k): value for k, value in batch.items()} for batch in record.batches]
    return record


def is_valid(record: Record) -> bool:
    """Whether every field has its type and every part what a row is made of: JSON may be damaged, too."""
    kinds = typing.get_type_hints(Record) | dict.fromkeys(("batch_sizes", "batches"), list)
    fields = all(isinstance(getattr(record, name), kind) for name, kind in kinds.items())
    if not fields or not all(isinstance(batch, dict) for batch in record.batches):
        return False
    parts = [(record.build or BUILD, BUILD), (record.check or CHECK, CHECK)]
    parts += [(batch.keys(), TIMED if batch.get("status") == "ok" else BATCH) for batch in record.batches]
    statuses = [record.status, *(batch.get("status") for batch in record.batches)]
    return all(set(held) >= needed for held, needed in parts) and all(one in STATUSES for one in statuses)


def note_sweep(asked: list[Job], **more) -> dict:
    """Note in sweep.json what is measured last, with `more` (precision_pct, spent_s); what it then says."""
    job, path = asked[0], asked[0].record.with_name("sweep.json")
    notes = read_dict(path)
    old = noted(notes, job.settings_key)
    note = old | {"settings": dataclasses.asdict(job.settings), "environment": job.environment} | more
    note["commands"] = list(dict.fromkeys([*old.get("commands", []), job.environment["command"]]))
    note["keys"] = old.get("keys", {}) | {str(one.image_size): one.key for one in asked}
    write_json(path, notes | {"last": job.settings_key, job.settings_key: note})
    return note


def noted(notes: dict, settings_key) -> dict:
    """What sweep.json notes of some settings."""
    note = notes.get(settings_key)
    return note if isinstance(note, dict) else {}


def read_roofline(folder, settings_key) -> dict | None:
    """What was measured of the machine by these settings, or None."""
    found = read_dict(folder / "ceilings.json")
    return found if found.get("settings_key") == settings_key else None


def read_sweep(folder) -> tuple[list[Record], dict, dict | None]:
    """A sweep's records of the settings and checkpoints that sweep.json says were measured last, or, where it
    is too old to say so, of the newest record's; oldest first; its note, and its roofline.

    `folder` is a Path or a zipfile.Path.
    """
    names = sorted(path.name for path in folder.iterdir() if re.search(r"_round\d+.*\.json$", path.name))
    records = filter(None, (read_record(folder / name) for name in names))
    found = sorted(records, key=lambda record: record.time)
    if not found:
        return [], {}, None
    notes = read_dict(folder / "sweep.json")
    key = notes.get("last")
    if not any(record.settings_key == key for record in found):
        key = found[-1].settings_key
    found = [record for record in found if record.settings_key == key]
    note = noted(notes, key)
    last = {str(record.image_size): record.key for record in found}
    keys = {record.key for record in found}
    last |= {size: noted_key for size, noted_key in note.get("keys", {}).items() if noted_key in keys}
    found = [record for record in found if record.key == last[str(record.image_size)]]
    return found, note, read_roofline(folder, key)


def archive_stale_records(asked: list[Job]) -> None:
    """Put records of other keys into folders of their own, overwriting nothing, and the asked ones back."""
    folder, settings_key, moved = asked[0].record.parent, asked[0].settings_key, set()
    keys = {job.image_size: job.key for job in asked}
    for path in folder.glob("*_round*.json"):
        one = read_record(path)
        if one and (one.settings_key, one.key) != (settings_key, keys.get(one.image_size, one.key)):
            aside = folder / one.key
            aside.mkdir(exist_ok=True)
            moved.add(path.replace(aside / path.name))
    for key in keys.values():
        for path in (folder / key).glob("*_round*.json"):
            path.replace(folder / path.name)
    if moved:
        kept = ", ".join(sorted({str(path.parent) for path in moved}))
        said = "they come back with them; to have both in the table, give one a --sweep of its own"
        what = f"{len(moved)} records of other settings or checkpoints are kept in {kept}"
        print(f"{what}: {said}", file=sys.stderr)


def sweeps_of(results: Path) -> dict:
    """Every sweep under results/raw/ by its name: its folder, or the zipfile.Path of its zip file.

    Raises UserError where a zip file is damaged.
    """
    raw = sorted((results / "raw").glob("*"))
    found: dict = {path.name: path for path in raw if path.is_dir() and any(path.glob("*_round*.json"))}
    for path in raw:
        if path.suffix == ".zip" and path.stem not in found:
            found[path.stem] = zipfile.Path(opened(path))
    return dict(sorted(found.items()))


def opened(packed: Path) -> zipfile.ZipFile:
    """A sweep's zip file.  Raises UserError where it is damaged."""
    try:
        file = zipfile.ZipFile(packed)
        damaged = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        damaged = error
    if damaged:
        raise UserError(f"{packed} is damaged ({damaged}); restore it: git checkout {packed}")
    return file


def pack(folder: Path) -> Path:
    """Move a sweep's records and notes into one zip file beside the folder; its path."""
    target, paths = folder.with_name(f"{folder.name}.zip"), sorted(folder.glob("*.json"))

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as file:
            for path in paths:
                content = json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"))
                file.writestr(zipfile.ZipInfo(path.name, ZIP_DATE), content, zipfile.ZIP_DEFLATED, 9)

    write_whole(target, write)
    for path in paths:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return target


def unpack(folder: Path) -> None:
    """Put a sweep's zip file back into its folder, to go on there; what lies there stays."""
    packed = folder.with_name(f"{folder.name}.zip")
    if packed.is_file():
        with opened(packed) as file:
            file.extractall(folder, [name for name in file.namelist() if not (folder / name).exists()])
        packed.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the raw records of every sweep into a zip file each.")
    parser.add_argument("results", nargs="+", type=Path, help="folders that hold raw/")
    for results in parser.parse_args().results:
        for folder in sweeps_of(results).values():
            if isinstance(folder, Path):
                packed = pack(folder)
                print(f"{packed}: {packed.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_main(main)
