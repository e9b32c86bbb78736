"""What holds in every script from its first import on, whatever it was started with."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import ROOT
from test_run_main import HEAD, posix

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # whose package is not here
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "run_main(" in path.read_text("utf-8"))


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_is_quiet(script, tmp_path):
    # In short sleeps, since a signal that another thread gets does not end the main thread's.
    slow = "import time\nprint('importing', flush=True)\nfor _ in range(1200): time.sleep(0.05)"
    (tmp_path / "argparse.py").write_text(slow, encoding="utf-8")  # every script imports it early
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == b"interrupted: run the same command again\n"


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&-"])
def test_closed_streams_change_neither_the_result_nor_what_files_hold(closed, tmp_path):
    (tmp_path / "script.py").write_text(f"""{HEAD}
import utils
utils.__file__ = {str(tmp_path / "utils" / "__init__.py")!r}  # as if this were one of the scripts
utils.prepare_process()
def main():
    import os
    write_atomic(Path({str(tmp_path / "table")!r}), "whole")
    with open({str(tmp_path / "other")!r}, "w") as other:
        print("said", file=sys.stderr)
        os.write(2, b"by a library")
        print("said")
        other.write("whole")
run_main(main)
""")
    done = subprocess.run(f"{sys.executable} {tmp_path}/script.py {closed}", shell=True)
    assert done.returncode == 0
    assert [(tmp_path / name).read_text() for name in ("table", "other")] == ["whole", "whole"]


def test_help_needs_neither_docstrings_nor_a_notebooks_backend():
    code = f"""import runpy, sys
for script in {SCRIPTS}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        print(script, "ended with", left.code)"""
    command, environment = [sys.executable, "-OO", "-c", code], {**os.environ, **NOTEBOOK}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for script in SCRIPTS:
        assert f"usage: {script} " in done.stdout and f"{script} ended with 0" in done.stdout, done.stderr


def test_charts_can_be_drawn_beside_a_notebooks_backend():
    code = f"import sys; sys.modules['__main__'].__file__ = {str(ROOT / 'train.py')!r}\n"
    code += "import utils, matplotlib"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **NOTEBOOK}, check=True)


def test_worker_processes_leave_ctrl_c_to_the_one_that_started_them():
    code = "(__import__('utils'), __import__('signal').getsignal(2))[1]"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # as on Windows
        assert pool.submit(eval, code).result() is signal.SIG_IGN
