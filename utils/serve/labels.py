"""labels.csv, written so that nothing is lost: whole or not at all, by one run at a time, and resumed.

Until all rows are there they stand in <out>.<key>.part<rank>, one for each process; the key is of the folder
and of the settings.
"""

import contextlib
import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.utils import UserError, check_folder, file_lock, named, write_whole

TEXT: dict = {
    "encoding": "utf-8",
    "errors": "surrogateescape",
    "newline": "",
}  # whatever bytes a file name has
BEGINS = b"path,class,probability"  # a table


def check_out(out: Path) -> Path:
    """The file to write, at the end of a link.  Raises UserError where something else than a table lies."""
    out = out.resolve() if out.is_symlink() else out
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it: --out {out / 'labels.csv'}")
    check_folder(out.parent)
    if out.exists():
        begins = out.read_bytes()[: len(BEGINS)] if out.is_file() else None
        if begins not in (b"", BEGINS):
            raise UserError(f"{out} is there and no table of this script; name another file: --out FILE")
    return out


@contextlib.contextmanager
def alone_at(out: Path, patience: float = 10) -> Iterator[None]:
    """Keep a second run from writing the same table: each would take the other's rows for its own."""
    lock = out.with_name(f"{out.name}.lock")
    with file_lock(lock, f"writing {out.name}", patience):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows lets nobody remove it yet
                lock.unlink()


def read_rows(part: Path, columns: int) -> dict[str, list[str]]:
    """path -> row, of the rows with so many columns that were written whole."""
    rows = {}
    with part.open(**TEXT) as file:
        whole = (line for line in file if line.endswith(("\n", "\r")))  # a name may have "\r" in it
        for path, *others in csv.reader(whole):
            if len(others) == columns - 1:
                path = os.fsdecode(path.encode(TEXT["encoding"], TEXT["errors"]))  # as it is known here
                rows[path] = [path, *others]
    return rows


def write_rows(path: Path, rows: Iterable[list[str]], mode: str = "w") -> None:
    """Write rows, or with mode "a" append them."""
    kinds = csv.QUOTE_MINIMAL, csv.QUOTE_ALL
    with named(path), path.open(mode, **TEXT) as file:
        usual, quoted = (csv.writer(file, lineterminator="\n", quoting=kind) for kind in kinds)
        for row in rows:  # a name's "\r" is not quoted of itself, and would end the row when read
            (quoted if "\r" in row[0] else usual).writerow(row)


def parts_of(out: Path, key: str) -> list[Path]:
    """The parts of a table by their key, a regular expression: of nothing else that lies there."""
    name = re.compile(rf"{re.escape(out.name)}\.{key}\.part\d+")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name) and path.is_file())


def still_right(part: Path, columns: int) -> dict[str, list[str]]:
    """The rows of a part whose files have not changed since."""

    def is_same(path: str) -> bool:
        with contextlib.suppress(OSError):
            found = Path(path).stat()
            return max(found.st_mtime, found.st_ctime) <= written
        return False

    written = part.stat().st_mtime
    return {path: row for path, row in read_rows(part, columns).items() if is_same(path)}


def resume(out: Path, key: str, columns: int, rank: int) -> tuple[Path, dict]:
    """This process's own part, cut back to whole rows, and the rows that any process has written already."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    for part in parts_of(out, key):
        done |= still_right(part, columns)
    own = out.with_name(f"{out.name}.{key}.part{rank}")
    kept = still_right(own, columns).values() if own.exists() else []
    write_whole(own, lambda path: write_rows(path, kept))
    return own, done


def merge(out: Path, key: str, images: list[str], header: list[str]) -> dict:
    """Write the rows of all parts to `out` in the order of the images, whole or not at all; path -> row."""
    rows = {}
    for part in sorted(parts_of(out, key), key=lambda part: part.stat().st_mtime):  # the newest counts
        rows |= read_rows(part, len(header))
    kept = {path: rows[path] for path in images if path in rows}
    write_whole(out, lambda path: write_rows(path, [header, *kept.values()]))
    source = key.partition("-")[0]
    for part in parts_of(out, f"{source}-[0-9a-f]+"):  # also those of this folder by other settings
        part.unlink()
    return kept
