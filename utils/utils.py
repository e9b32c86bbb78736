"""What scripts share: user errors and the way out, processes, arguments, whole files, hashes."""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import psutil

IMAGE_SIZES = [224, 256, 384, 512]  # pixels, square
BATCH_SIZES = [1, 8, 16]
ROOT = Path(__file__).resolve().parent.parent
LARGE = ["torch", "torch.utils.flop_counter", "pandas"]


class UserError(Exception):
    """Something the user can mend: one sentence with the path and the command that repairs it."""


# ---- the way out of every script

AGAIN = "then run the same command again"
WINDOWS = sys.platform == "win32"
MOST_WORKERS = 61 if WINDOWS else 256  # Windows lets a process wait for so many others
HELD = "close it if another program, say Excel, holds it open, or " if WINDOWS else ""
MENDS = {  # what the system says -> what is wrong with the file; what mends it
    errno.ENOSPC: "no room is left on the disk; free some",
    **dict.fromkeys([errno.EACCES, errno.EPERM], f"access is denied; {HELD}change its permissions"),
    errno.ENOENT: "there is no such file or folder; put it there or name another one",
    **dict.fromkeys([errno.ENOTDIR, errno.EEXIST], "a file is where a folder belongs; move it away"),
    errno.EISDIR: "a folder is where a file belongs; move it away",
    errno.EROFS: "the disk is read-only; name another folder",
}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524}  # of file systems, network drives for instance


def run_main(main: Callable) -> None:
    """Run a script's main(); what a user can mend is one sentence on stderr and exit code 2.

    Exit codes of what is quiet: 130 Ctrl-C, 143 SIGTERM, 141 a reader that closed the pipe (`... | head`).
    A bug stays a traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # consoles and LC_ALL=C lack Cyrillic; names may be any bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = signal_again
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        leave(2, f"error: {error}")
    except KeyboardInterrupt as signalled:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not interrupt the cleaning up
            signal.signal(number, signal.SIG_IGN)
        code = 143 if signal.SIGTERM in signalled.args else 130
        leave(code, "interrupted: run the same command again")
    except MemoryError:
        smaller = "use smaller --image-sizes or batches, or fewer --workers"
        leave(2, f"error: this machine's memory does not suffice; {smaller}, {AGAIN}")
    except BrokenExecutor:
        leave(2, f"error: a worker process was killed, perhaps for want of memory; free some, {AGAIN}")
    except UnicodeError as error:
        leave(2, f"error: {str(error)[:200]}; save the file as UTF-8 or set PYTHONUTF8=1, {AGAIN}")
    except OSError as error:
        # Windows says EINVAL where a reader (`| more`) has closed its end.
        closed = isinstance(error, BrokenPipeError) or (WINDOWS and error.errno == errno.EINVAL)
        if let_go_of_stdout(closed) and closed:
            sys.exit(141)
        if error.errno is None:  # raised by a program, not by the system
            raise
        leave(2, f"error: {sentence(error)}")


def sentence(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{MENDS.get(error.errno or 0, f'{error.strerror}; mend that')}, {AGAIN}"


def leave(code: int, text: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end is no place for a traceback
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def let_go_of_stdout(closed: bool) -> bool:
    """Whether it can take no more; then what is left goes nowhere, else Python complains at its end."""
    try:
        sys.stdout.flush()
        if closed:  # is it stdout's pipe, or another one?  A flush that failed does not fail again
            os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def terminate(number: int, frame) -> None:
    raise KeyboardInterrupt(number)  # what cleans up after Ctrl-C cleans up after SIGTERM


def signal_again(dropped) -> None:
    """Python drops what a signal raises in a __del__ or around a fork; the signal is sent anew then."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = signal.SIGTERM if signal.SIGTERM in dropped.exc_value.args else signal.SIGINT
    send = signal.raise_signal
    if hasattr(signal, "pthread_kill"):  # not on Windows; only this one ends what the main thread waits for
        send = functools.partial(signal.pthread_kill, threading.main_thread().ident or 0)
    again = threading.Timer(0.05, send, [number])  # by then that place is left; if not, once more
    again.daemon = True
    with contextlib.suppress(RuntimeError):  # Python is ending: no new threads, and no need of one
        again.start()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off until the block's end.  For the main thread; of no effect in others."""
    caught, main = [], threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda *told: caught.append(told[0])) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


# ---- processes


def fresh_processes(*modules: str, large=LARGE):
    """multiprocessing's means to start clean processes.

    On Linux they are forked from a server that has only imported the `large` libraries, what the running
    script imports and `modules`, which saves each seconds; elsewhere each starts from nothing.  They leave
    Ctrl-C to the process that started them.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker  # Windows has none

    context = multiprocessing.get_context("forkserver")
    script = Path(getattr(sys.modules["__main__"], "__file__", "") or "")
    own = [script.stem] if script.resolve().parent == ROOT else []
    context.set_forkserver_preload([*large, *own, *modules])
    # A process that is ended in the midst of an import leaves semaphores, which the tracker removes quietly.
    if (quiet := "ignore:resource_tracker") not in sys.warnoptions:
        sys.warnoptions.append(quiet)
    resource_tracker.ensure_running()  # starting it would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it
    here = Path.cwd()
    os.chdir(ROOT)  # the server imports from where it is started; its processes go to where this one is
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent() -> None:
    """In a worker process: end when the process that started it has ended, however that ended."""
    sentinel = typing.cast(typing.Any, multiprocessing.parent_process()).sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_fresh_process(function, *arguments):
    """What the function returns in a process that ends afterwards, with this one or when interrupted."""
    # One that was started itself starts it from nothing: a server of its own would stay beside it.
    started = multiprocessing.parent_process() is not None
    processes = multiprocessing.get_context("spawn") if started else fresh_processes()
    with ProcessPoolExecutor(1, processes, end_with_parent) as pool:
        with uninterrupted():  # a process that is on its way when this one ends would complain
            worker = psutil.Process(pool.submit(os.getpid).result())
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
            raise


@contextlib.contextmanager
def file_lock(lock: Path, doing: str, patience: float = 10) -> Iterator[None]:
    """Hold `lock` against a second process; UserError if another has it for `patience` seconds."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # given where only a weaker kind of lock can be had
            held = FileLock(lock, timeout=patience).acquire()
    except Timeout as error:
        raise UserError(f"another process is {doing} in {lock.parent}; wait for its end, {AGAIN}") from error
    except (OSError, NotImplementedError, UserWarning) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        mend = "name a folder on a local disk (--data, --weights, --results or --out)"
        raise UserError(f"{lock.parent}: its file system offers no locks ({error}); {mend}") from error
    with held:
        yield


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    holds = {"data": "train/<class>/ and test/<class>/", "weights": "checkpoints, exports and engines"}
    for name, what in {**holds, "results": "records, tables and charts"}.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(name), help=f"folder of {what}")


def checkpoint_path(weights: Path, image_size: int, which: str = "best") -> Path:
    """The best epoch's; or the "last", while a training goes on or was interrupted."""
    return weights / f"{which}_resnet18_{image_size}.pth"


def number(kind: type, least: float, most: float) -> Callable[[str], int | float]:
    """For argparse's `type=`: an int or float from `least` to `most`, else one sentence and exit code 2."""

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:  # this refuses NaN, too
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{what} from {least} to {most} is needed, not {text!r}")

    return parse


# ---- files


def check_folder(folder: Path) -> None:
    """Make the folder and see that files can be written there, now and not after hours.  Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files of processes that were killed.  To be called before this process writes."""
    for path in (path for folder in folders for path in folder.glob("*.tmp*")):
        made = re.search(r"\.(\d+)\.tmp(\.\w+)?$", path.name)
        if made and (int(made[1]) == os.getpid() or not psutil.pid_exists(int(made[1]))):
            path.unlink(missing_ok=True)


def rename_to_backup(path: Path) -> Path:
    """Rename `path` to the first free one of path.1, path.2, ..."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def read_dict(path: Path) -> dict:
    """The content of a JSON file that holds a dict; {} where it is missing, damaged or anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        found = None
    return found if isinstance(found, dict) else {}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none; file names that are no UTF-8 are escaped, as JSON reads them back."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary)` write a file of the same suffix beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with named(path, temporary):
            write(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Have the system's errors name `path`: a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise


def write_json(path: Path, value) -> None:
    """Indented, but for lists of numbers, which stay on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r'\[\n([^\[\]{}"]*?)\n\s*\]', lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomic(path, text + "\n")


def sha256(*parts: str | bytes | Path) -> str:
    """The hash of texts, bytes and files' contents in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(str(len(content)).encode() + b":" + content)
    return digest.hexdigest()
