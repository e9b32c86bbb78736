"""What every script shares: the way out, locks, temporary files, folders, and helper processes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from utils.measure.jobs import name_problem
from utils.utils import (
    UserError,
    check_folder,
    file_lock,
    read_dict,
    remove_leftovers,
    rename_to_backup,
    sentence,
    write_atomic,
    write_json,
)

posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and limits of POSIX")
HEAD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from utils.utils import *; from pathlib import Path\n"


def start(body: str, environment: dict | None = None, **options) -> subprocess.Popen:
    """A fresh process whose main() is `body`, run as every script runs its own."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"{HEAD}def main():\n{lines}run_main(main)\n"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})})
    return subprocess.Popen([sys.executable, "-c", code], **{**pipes, **options})


def run(body: str, environment: dict | None = None) -> tuple[int, str, str]:
    process = start(body, environment)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out.decode("utf-8"), errors.decode("utf-8")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("raise UserError('a.png is broken; delete it')", 2, "error: a.png is broken; delete it"),
        ("Path('/no/such/file').read_text()", 2, "/no/such/file: there is no such file or folder; "),
        ("(Path(__import__('os').devnull) / 'x').mkdir()", 2, "a file is where a folder belongs"),
        ("Path('/').read_bytes()", 2, "error: /: a folder is where a file belongs"),
        ("raise MemoryError", 2, "memory does not suffice"),
        ("raise KeyboardInterrupt", 130, "interrupted: run the same command again"),
        ("raise OSError('a bug')", 1, "Traceback"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("pass", 0, ""),
    ],
)
@posix
def test_every_end_has_its_code_and_its_sentence(body, code, said):
    found, _, errors = run(body)
    assert found == code and said in errors
    assert code == 1 or ("Traceback" not in errors and errors.count("\n") <= 1)


@posix
def test_a_full_disk_and_a_file_limit_name_the_file(tmp_path):
    path = tmp_path / "table.csv"
    write_atomic(path, "old")
    body = f"""import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_atomic(Path({str(path)!r}), "x" * 100_000)"""
    code, _, errors = run(body)
    assert code == 2 and f"{path}: File too large; mend that, then run" in errors
    assert path.read_text(encoding="utf-8") == "old" and names_in(tmp_path) == ["table.csv"]
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full:
            process = start("print('x', flush=True)", stdout=full)
            assert b"no room is left on the disk" in process.communicate(timeout=60)[1]
            assert process.returncode == 2


@posix
def test_a_closed_pipe_is_quiet():
    process = start("for number in range(100_000): print(number)")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


@posix
def test_windows_word_for_a_closed_pipe_is_quiet_too():
    """Where a reader (`| more`) has closed its end, Windows says EINVAL."""
    process = start("""import errno, utils.utils
utils.utils.WINDOWS = True
try:
    for number in range(100_000): print(number)
except BrokenPipeError:
    raise OSError(errno.EINVAL, "Invalid argument") from None""")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


@posix
@pytest.mark.parametrize("number, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_end_it_quietly_after_cleaning_up(number, code):
    process = start("""import time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)""")
    process.stdout.readline()
    process.send_signal(getattr(signal, number))
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code and b"cleaned up" in out and b"Traceback" not in errors


@posix
@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_names_of_any_bytes_are_printed_and_stored(tmp_path, locale):
    name = os.fsdecode(b"caf\xe9 \xd0\x9f")
    (tmp_path / name).touch()
    body = f"""import os
names = os.listdir({str(tmp_path)!r})
print(names[0], sha256(names[0])[:4], flush=True)
write_json(Path({str(tmp_path / "names.json")!r}), {{"names": names}})"""
    environment = {"LC_ALL": locale}
    code, out, errors = run(body, environment)
    assert code == 0 and "caf" in out, errors
    assert read_dict(tmp_path / "names.json") == {"names": [name]}


@posix
def test_a_worker_ends_with_its_parent(tmp_path):
    (tmp_path / "work.py").write_text(
        f"""{HEAD}
import multiprocessing, os, time
def work(path):
    end_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],))
    process.start()
    process.join()
""",
        encoding="utf-8",
    )
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, tmp_path / "work.py", told])
    end = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    worker = psutil.Process(int(told.read_text()))
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_does_not_keep_it_from_ending(tmp_path, number, code):
    told = tmp_path / "begun"
    work = f"import time; open({str(told)!r}, 'w').close(); time.sleep(600)"
    process = start(f"in_fresh_process(exec, {work!r})", start_new_session=True)
    while not told.exists() and process.poll() is None:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(2):
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors == b"interrupted: run the same command again\n"
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_a_fresh_process_stands_where_this_one_does_and_imports_nothing_from_there(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("")  # a package of the user's by one of our names
    (tmp_path / "pandas.py").write_text("raise RuntimeError('not the library')")
    script = tmp_path / "elsewhere" / "where.py"
    script.parent.mkdir()
    script.write_text(
        f"""{HEAD}
def where():
    import os, sys
    import utils.serve.pipeline
    return os.getcwd(), utils.serve.pipeline.__file__, "torch" in sys.modules
if __name__ == "__main__":
    fresh_processes("utils.serve.pipeline")
    print(*in_fresh_process(where), sep="\\n")
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    pipeline = str(ROOT / "utils" / "serve" / "pipeline.py")
    assert done.stdout.splitlines() == [str(tmp_path), pipeline, "True"], done.stderr


def test_a_lock_keeps_a_second_one_out_and_is_free_again(tmp_path):
    with file_lock(tmp_path / ".lock", "training"):
        process = start(f"with file_lock(Path({str(tmp_path / '.lock')!r}), 'training', 0.1): pass")
        assert b"another process is training in" in process.communicate(timeout=60)[1]
        assert process.returncode == 2
    with file_lock(tmp_path / ".lock", "training"):
        pass


def test_only_temporary_files_of_the_dead_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent = os.getppid()
    names = [f"best.{dead.pid}.tmp.pth", f"a.{parent}.tmp.csv", f"x.{dead.pid}.tmp", "notes.tmp", "b.pth"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, tmp_path / "not there")
    assert names_in(tmp_path) == sorted([f"a.{parent}.tmp.csv", "notes.tmp", "b.pth"])


def test_what_is_set_aside_replaces_nothing(tmp_path):
    path = tmp_path / "a.pth"
    for content in ("first", "second"):
        path.write_text(content)
        rename_to_backup(path)
    assert [(tmp_path / f"a.pth.{k}").read_text() for k in (1, 2)] == ["first", "second"]


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_done(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert names_in(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised:
        check_folder(tmp_path / "file" / "b")
    assert "file" in sentence(raised.value) and "a file is where a folder belongs" in sentence(raised.value)


def test_damaged_json_is_an_empty_dict(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"", b'{"a": ', b"\xff\xfe", b"[" * 200_000):
        path.write_bytes(content)
        assert read_dict(path) == {}
    write_json(path, {"a": [1, 2]})
    assert read_dict(path) == {"a": [1, 2]}


# ---- other systems


@pytest.mark.parametrize(
    "name, problem",
    [
        ("torch-2.14_a.b", None),
        ("a.", "no dot at the end"),
        ("..", "no dot at the end"),
        ("a/b", "use letters"),
        ("con", "Windows keeps this name"),
        ("LPT1.txt", "Windows keeps this name"),
        ("Main", "it is the folder 'main'"),
        ("main", None),
    ],
)
def test_names_that_windows_folds_or_keeps_are_refused(name, problem):
    found = name_problem(name, ["main", "other"])
    assert found is None if problem is None else problem in found


def test_messages_advise_nothing_that_windows_lacks():
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from utils import utils
import importlib
sys.platform = "win32"
importlib.reload(utils)
print(utils.MENDS, utils.MOST_WORKERS)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit" not in done.stdout and "Excel" in done.stdout and done.stdout.endswith(" 61\n")


@posix
@pytest.mark.parametrize("number, code", [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("place", ["__del__", "fork"])
def test_a_signal_where_python_drops_exceptions_is_not_lost(number, code, place):
    process = start(f"""import os, time
class Slow:
    def __del__(self=None):
        print("ready", flush=True)
        time.sleep(1)
if {place!r} == "fork":
    os.register_at_fork(after_in_parent=Slow.__del__)
    if os.fork() == 0:
        os._exit(0)
else:
    Slow()
time.sleep(20)""")
    process.stdout.readline()
    process.send_signal(getattr(signal, number))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors == b"interrupted: run the same command again\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
@posix
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}: its file system offers no locks.*local disk"):
        file_lock(tmp_path / ".lock", "training", 0.1).__enter__()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_what_a_disk_lacks_is_called_so(tmp_path, number):
    said = sentence(OSError(number, "x", str(tmp_path)))
    assert "disk" in said and str(tmp_path) in said
