"""labels.csv, written so that nothing is lost: whole or not at all, by one run at a time, and resumed.

Until all rows are there they stand in <out>.<key>.part<rank>, one for each process; the key is of the folder
and of the settings.
"""

import contextlib
import csv
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.utils import WINDOWS, UserError, check_folder, file_lock, named, write_whole

# File names may have any bytes on Linux, and halves of surrogates on Windows.
TEXT: dict = dict(encoding="utf-8", newline="", errors="surrogatepass" if WINDOWS else "surrogateescape")
COLUMNS = ["path", "class", "probability"]  # then, if asked for, a probability for each class
BOM = "\ufeff"  # by which Excel knows UTF-8
SHARE = re.compile(r"[01]\.\d{6}")


def check_out(out: Path) -> Path:
    """The file to write, at the end of a link.  Raises UserError where something else than a table lies."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it: --out {out / 'labels.csv'}")
    if out.exists() and not (out.is_file() and is_ours(out)):
        raise UserError(f"{out} is there and no table of this script; name another file: --out FILE")
    out = Path(os.path.realpath(out)) if out.is_symlink() else out  # resolve() fails on a link to itself
    check_folder(out.parent)
    return out


def is_ours(out: Path) -> bool:
    """Whether a file is empty or exactly a table as written here: a column that somebody added is kept."""
    mode = "r+" if WINDOWS else "r"  # what is open in Excel can't be replaced, which is to be said at once
    try:
        with named(out), out.open(mode, **TEXT) as file:
            header, *rows = itertools.islice(csv.reader(file), 1000)
    except ValueError:  # nothing in it; or no text
        return out.stat().st_size == 0
    except csv.Error:
        return False
    header[0] = header[0].removeprefix(BOM)
    whole = all(len(row) == len(header) and all(map(SHARE.fullmatch, row[2:])) for row in rows if row)
    return header[:3] == COLUMNS and whole


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
                rows[path] = [path, *others]
    return rows


def write_rows(path: Path, rows: Iterable[list[str]], mode: str = "w") -> None:
    """Write rows, or with mode "a" append them."""
    kinds = csv.QUOTE_MINIMAL, csv.QUOTE_ALL
    with named(path), path.open(mode, **TEXT) as file:
        usual, quoted = (csv.writer(file, lineterminator="\n", quoting=kind) for kind in kinds)
        for row in rows:  # "\r" in a name is not quoted of itself, and would end the row when read
            (quoted if any("\r" in field for field in row) else usual).writerow(row)


def parts_of(out: Path, key: str) -> list[Path]:
    """The parts of a table by their key, a regular expression, the newest last."""
    name = re.compile(rf"{re.escape(out.name)}\.{key}\.part\d+")
    parts = [path for path in out.parent.iterdir() if name.fullmatch(path.name) and path.is_file()]
    return sorted(parts, key=lambda path: path.stat().st_mtime)


def resume(out: Path, key: str, columns: int, rank: int) -> tuple[Path, dict]:
    """This process's own part, and the rows in it: all that were written whole, of files unchanged since."""
    out.parent.mkdir(parents=True, exist_ok=True)
    own, done = out.with_name(f"{out.name}.{key}.part{rank}"), {}
    for part in parts_of(out, key):
        written = part.stat().st_mtime
        for path, row in read_rows(part, columns).items():
            with contextlib.suppress(OSError):
                file = Path(path).stat()
                if max(file.st_mtime, file.st_ctime) <= written:
                    done[path] = row
    if done:
        write_whole(own, lambda path: write_rows(path, done.values()))
    else:
        own.unlink(missing_ok=True)
    return own, done


def merge(out: Path, key: str, images: list[str], header: list[str], bom: bool = False) -> dict:
    """Write the rows of all parts to `out` in the order of the images, whole or not at all; path -> row."""
    rows = {}
    for part in parts_of(out, key):
        rows |= read_rows(part, len(header))
    kept = {path: rows[path] for path in images if path in rows}
    first = [BOM * bom + header[0], *header[1:]]
    write_whole(out, lambda path: write_rows(path, [first, *kept.values()]))
    for part in parts_of(out, key.partition("-")[0] + "-[0-9a-f]+"):  # also by other settings
        part.unlink()
    return kept
