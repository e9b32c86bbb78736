"""Imported first by every script: what must hold while large libraries are still being imported."""

import os
import signal
import sys
import time

STARTED = time.perf_counter()  # this process's imports come after it


def interrupt(number, frame) -> None:
    """Ctrl-C: KeyboardInterrupt; during an import the end at once, since half imported libraries complain."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted: run the same command again\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def prepare_process() -> None:
    """For our scripts and their worker processes; programs of others that import this stay as they are."""
    processes = sys.modules.get("multiprocessing.process")
    worker = bool(processes and processes.parent_process())
    script, here = getattr(sys.modules["__main__"], "__file__", None) or "", os.path.abspath(__file__)
    if not worker and os.path.dirname(os.path.abspath(script)) != os.path.dirname(os.path.dirname(here)):
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Workers leave Ctrl-C to the process that started them.
        signal.signal(signal.SIGINT, signal.SIG_IGN if worker else interrupt)
    # Charts go into files; the value that notebooks set names a package that this environment lacks.
    os.environ["MPLBACKEND"] = "agg"
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (2>&-): its number is taken before the next file gets it
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))


prepare_process()
