"""The files of results/raw/: a record for each process that measured, and what belongs to a whole sweep.

Beside a sweep's records lie sweep.json (settings and environment, once for each key that says when records
are stale, and every command) and ceilings.json.
"""

import dataclasses
import datetime
import sys
import typing
from pathlib import Path

from utils.measure.schema import STATUSES, Job, Record
from utils.utils import read_dict, write_json

# What a record's parts must have for a row to be made of them.
BUILD = {"seconds", "from_cache", "artefact_mb"}
CHECK = {"images", "different", "correct", "max_abs_diff", "tolerance"}
BATCH = {"batch_size", "status", "reason"}
SAMPLES = ("host_ms", "enqueue_ms", "gpu_ms")
TIMED = {*SAMPLES, "sustained", "memory_of", "gpu_memory_mb", "torch_memory_mb", "host_memory_mb"}


def start(job: Job, **known) -> Record:
    """An empty record of a job; `known` fills in what is known already."""
    fields = ("sweep", "backend", "device", "image_size", "round", "key", "settings_key")
    copied = {name: getattr(job, name) for name in fields}
    copied |= {"precision": "", "batch_sizes": list(job.batch_sizes), "runs": job.settings.runs}
    copied["further"] = job.round >= job.settings.rounds
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    return Record(time=now, **copied | known)


def read_record(path: Path) -> Record | None:
    """The record in a file, or None where it is missing, was cut short, damaged or is of another kind."""
    found = read_dict(path)
    known = {field.name for field in dataclasses.fields(Record)}
    try:
        record = Record(**{name: value for name, value in found.items() if name in known})
    except TypeError:  # a field is missing
        return None
    return record if is_valid(record) else None


def is_valid(record: Record) -> bool:
    """Whether every field has its type and every part what a row is made of: JSON may be damaged, too."""
    kinds = typing.get_type_hints(Record) | dict.fromkeys(("batch_sizes", "batches"), list)
    if not all(isinstance(getattr(record, name), kind) for name, kind in kinds.items()):
        return False
    parts = [(record.build, BUILD), (record.check, CHECK), *((batch, BATCH) for batch in record.batches)]
    parts += [(batch, TIMED) for batch in record.batches if isinstance(batch, dict) and "host_ms" in batch]
    parts = [(part, needed) for part, needed in parts if part is not None]
    if not all(isinstance(part, dict) and needed <= part.keys() for part, needed in parts):
        return False
    samples = [batch[name] for batch in record.batches if "host_ms" in batch for name in SAMPLES]
    whole = all(
        isinstance(ms, list) and all(isinstance(value, (int, float)) for value in ms) for ms in samples
    )
    statuses = {record.status, *(batch["status"] for batch in record.batches)}
    return whole and statuses <= set(STATUSES) and all(batch.get("host_ms", True) for batch in record.batches)


def write_record(path: Path, record: Record) -> None:
    write_json(path, dataclasses.asdict(record))


def is_current(record: Record | None, job: Job) -> bool:
    return record is not None and record.key == job.key


def kept_batches(record: Record | None, job: Job) -> list[dict]:
    """What a record of the same key holds and need not be measured again: all that has not failed."""
    batches = record.batches if is_current(record, job) else []
    return [batch for batch in batches if batch["status"] != "failed"]


def note_failure(job: Job, reason: str) -> None:
    """Write the record of a process that could not go on: what it has not measured has failed."""
    record = read_record(job.record)
    if not is_current(record, job):
        record = start(job, status="failed", reason=reason)
    missing = [size for size in job.batch_sizes if not record.batch(size)]
    for size in missing[:1] if job.auto else missing:
        record.batches.append({"batch_size": size, "status": "failed", "reason": reason})
    record.batches.sort(key=lambda batch: batch["batch_size"])
    write_record(job.record, record)


def note_sweep(job: Job, **more) -> dict:
    """Say in sweep.json under which settings, in which environment and by which commands records are made.

    `more` is added (precision_pct, spent_s); the whole note is returned.
    """
    path = job.record.with_name("sweep.json")
    notes = read_dict(path)
    old = notes.get(job.settings_key)
    old = old if isinstance(old, dict) else {}
    commands = list(dict.fromkeys([*old.get("commands", []), job.environment["command"]]))
    settings = dataclasses.asdict(job.settings)
    note = old | {"settings": settings, "environment": job.environment, "commands": commands} | more
    write_json(path, notes | {job.settings_key: note})
    return note


def read_sweep(folder: Path) -> tuple[list[Record], dict, dict | None]:
    """A sweep's records that belong together, its note in sweep.json, and what was measured of its machine.

    They are those of the newest settings and, at each image size, of its newest checkpoint, oldest first.
    """
    found = [read_record(path) for path in sorted(folder.glob("*_round*.json"))]
    found = sorted(filter(None, found), key=lambda record: record.time)
    if not found:
        return [], {}, None
    key = found[-1].settings_key
    newest = {record.image_size: record.key for record in found}
    found = [
        record for record in found if record.settings_key == key and record.key == newest[record.image_size]
    ]
    note, limits = read_dict(folder / "sweep.json").get(key), read_dict(folder / "ceilings.json")
    known = limits.get("settings_key") == key and {"tflops", "gb_per_s"} <= limits.keys()
    return found, note if isinstance(note, dict) else {}, limits if known else None


def archive_stale_records(job: Job) -> None:
    """Put a sweep's records of other settings into folders of their own, and those of this job's back.

    So measuring by other settings, on another machine or with other packages overwrites nothing.
    """
    folder, moved = job.record.parent, set()
    for path in folder.glob("*_round*.json"):
        record = read_record(path)
        if record and record.settings_key != job.settings_key and str(record.settings_key).isalnum():
            aside = folder / str(record.settings_key)
            aside.mkdir(exist_ok=True)
            moved.add(path.replace(aside / path.name))
    for path in (folder / job.settings_key).glob("*_round*.json"):
        path.replace(folder / path.name)
    if moved:
        kept = ", ".join(sorted({str(path.parent) for path in moved}))
        said = "they come back with their settings; to have both in the table, give one a --sweep of its own"
        print(f"{len(moved)} records of other settings are kept in {kept}: {said}", file=sys.stderr)


def sweep_folders(results: Path) -> list[Path]:
    return sorted(path for path in (results / "raw").glob("*") if path.is_dir())
