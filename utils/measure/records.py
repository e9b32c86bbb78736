"""The files of results/raw/: a record for each process that measured, and what belongs to a whole sweep.

Beside a sweep's records lie sweep.json (which settings were measured last; for each, by its key: settings,
environment and every command) and ceilings.json.  A published sweep is one zip file with the same content:

    python -m utils.measure.records results/published/h200
"""

import argparse
import dataclasses
import datetime
import json
import re
import sys
import typing
import zipfile
import zlib
from pathlib import Path

from utils.measure.schema import STATUSES, Job, Record
from utils.utils import UserError, read_dict, run_main, write_json, write_whole

# What a record's parts must have for a row to be made of them.
BUILD = {"seconds", "from_cache", "artefact_mb"}
CHECK = {"images", "different", "correct", "max_abs_diff", "tolerance"}
BATCH = {"batch_size", "status", "reason"}
SAMPLES = ("host_ms", "enqueue_ms", "gpu_ms")
TIMED = {*SAMPLES, "sustained", "memory_of", "gpu_memory_mb", "torch_memory_mb", "host_memory_mb"}
NOTES = {"settings": dict, "environment": dict, "commands": list, "keys": dict, "spent_s": (int, float)}
NOTES["precision_pct"] = (int, float)
RENAMED = {"beside_ms": "baseline_ms", "turns": "block_runs"}  # in records made before 2026-11-28
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that equal records make equal zips


def start(job: Job, **known) -> Record:
    """An empty record of a job; `known` fills in what is known already."""
    fields = ("sweep", "backend", "device", "image_size", "round", "key", "settings_key")
    copied = {name: getattr(job, name) for name in fields}
    copied |= {"precision": "", "batch_sizes": list(job.batch_sizes), "runs": job.settings.runs}
    copied["further"] = job.round >= job.settings.rounds
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    return Record(time=now, **copied | known)


def resume(job: Job, earlier: Record | None) -> Record:
    """The record that a job goes on with: an earlier one of its key, without what failed, or an empty one."""
    fresh = start(job)
    if earlier is None or earlier.key != job.key:
        return fresh
    kept = {"status": "ok", "reason": "", "batches": kept_batches(earlier)}
    return dataclasses.replace(earlier, time=fresh.time, batch_sizes=fresh.batch_sizes, **kept)


def read_record(path: Path) -> Record | None:
    """The record in a file, or None where it is missing, was cut short, damaged or is of another kind."""
    found = read_dict(path)
    known = {field.name for field in dataclasses.fields(Record)}
    try:
        record = Record(**{name: value for name, value in found.items() if name in known})
    except TypeError:  # a field is missing
        return None
    if not is_valid(record):
        return None
    for batch in record.batches:
        for old in RENAMED.keys() & batch.keys():
            batch[RENAMED[old]] = batch.pop(old)
    return record


def is_valid(record: Record) -> bool:
    """Whether every field has its type and every part what a row is made of: JSON may be damaged, too."""
    kinds = typing.get_type_hints(Record) | dict.fromkeys(("batch_sizes", "batches"), list)
    if not all(isinstance(getattr(record, name), kind) for name, kind in kinds.items()):
        return False
    parts = [(record.build, BUILD), (record.check, CHECK)]
    whole = all(needed <= part.keys() for part, needed in parts if part is not None)
    return whole and record.status in STATUSES and all(map(is_batch, record.batches))


def is_batch(batch) -> bool:
    """Whether it is what a record holds of one batch size: its samples, or why there are none."""
    if not (isinstance(batch, dict) and batch.keys() >= BATCH and isinstance(batch["batch_size"], int)):
        return False
    if "host_ms" not in batch:
        return batch["status"] in STATUSES[1:]
    times = [batch.get(name) for name in SAMPLES]
    whole = all(
        isinstance(ms, list) and all(isinstance(x, int | float) and x >= 0 for x in ms) for ms in times
    )
    return (
        whole and batch.keys() >= TIMED and min(batch["host_ms"], default=0) > 0 and batch["status"] == "ok"
    )


def write_record(path: Path, record: Record) -> None:
    write_json(path, dataclasses.asdict(record))


def kept_batches(record: Record) -> list[dict]:
    """What a record of the same key holds and need not be measured again: all that has not failed."""
    return [batch for batch in record.batches if batch["status"] != "failed"]


def note_sweep(asked: list[Job], **more) -> dict:
    """Say in sweep.json what is measured last, by which settings, in which environment and by which commands.

    `more` is added (precision_pct, spent_s); what is noted of these settings is returned.
    """
    job, path = asked[0], asked[0].record.with_name("sweep.json")
    notes = read_dict(path)
    old = noted(notes, job.settings_key)
    note = old | {"settings": dataclasses.asdict(job.settings), "environment": job.environment} | more
    note["commands"] = list(dict.fromkeys([*old.get("commands", []), job.environment["command"]]))
    note["keys"] = old.get("keys", {}) | {str(one.image_size): one.key for one in asked}
    write_json(path, notes | {"last": job.settings_key, job.settings_key: note})
    return note


def noted(notes: dict, settings_key) -> dict:
    """What sweep.json notes of some settings, without what is of another kind (it may be damaged)."""
    note = notes.get(settings_key)
    known = note.items() if isinstance(note, dict) else ()
    return {name: value for name, value in known if isinstance(value, NOTES.get(name, object))}


def read_roofline(folder, settings_key) -> dict | None:
    """What was measured of the machine by these settings, or None."""
    found = read_dict(folder / "ceilings.json")
    whole = isinstance(found.get("tflops"), dict) and isinstance(found.get("gb_per_s"), int | float)
    return found if whole and found.get("settings_key") == settings_key else None


def read_sweep(folder) -> tuple[list[Record], dict, dict | None]:
    """A sweep's records that belong together, its note in sweep.json, and what was measured of its machine.

    `folder` is a Path or a zipfile.Path.  The records are those of the settings and, at each size, of the
    checkpoint that sweep.json says were measured last; where it is too old to say so, those of the newest
    record.  Oldest first.
    """
    names = sorted(path.name for path in folder.iterdir() if re.search(r"_round\d+.*\.json$", path.name))
    found = [read_record(folder / name) for name in names]
    found = sorted(filter(None, found), key=lambda record: record.time)
    if not found:
        return [], {}, None
    notes = read_dict(folder / "sweep.json")
    key = notes.get("last")
    if not any(record.settings_key == key for record in found):
        key = found[-1].settings_key
    found = [record for record in found if record.settings_key == key]
    note = noted(notes, key)
    last = {record.image_size: record.key for record in found}
    for record in found:
        if note.get("keys", {}).get(str(record.image_size)) == record.key:
            last[record.image_size] = record.key
    found = [record for record in found if record.key == last[record.image_size]]
    return found, note, read_roofline(folder, key)


def archive_stale_records(asked: list[Job]) -> None:
    """Put records of other settings or checkpoints into folders of their own, and the asked ones back.

    So measuring by other settings, another network, on another machine or with other packages overwrites
    nothing.
    """
    folder, moved = asked[0].record.parent, set()
    keys = {job.image_size: job.key for job in asked}
    for path in folder.glob("*_round*.json"):
        record = read_record(path)
        if record is None:
            continue
        stale = record.key != keys.get(record.image_size, record.key)
        if (stale or record.settings_key != asked[0].settings_key) and str(record.key).isalnum():
            aside = folder / str(record.key)
            aside.mkdir(exist_ok=True)
            moved.add(path.replace(aside / path.name))
    for key in dict.fromkeys(
        [*keys.values(), asked[0].settings_key]
    ):  # until 2026-11-28 it was the settings'
        for path in (folder / key).glob("*_round*.json"):
            path.replace(folder / path.name)
    if moved:
        kept = ", ".join(sorted({str(path.parent) for path in moved}))
        said = "they come back with them; to have both in the table, give one a --sweep of its own"
        print(
            f"{len(moved)} records of other settings or checkpoints are kept in {kept}: {said}",
            file=sys.stderr,
        )


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
        for folder in sorted(path for path in (results / "raw").glob("*") if any(path.glob("*_round*.json"))):
            packed = pack(folder)
            print(f"{packed}: {packed.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_main(main)
