"""predict.py in several processes: how torchrun's share the files, the cores and one table."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, start_script
from test_predict import label, read

from utils import environment


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's alone")
def test_processes_keep_to_shares_of_the_cores(monkeypatch):
    cpus, kept = set(range(32)), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: kept.append(sorted(share)))
    for index in range(2):
        environment.keep_to_share(index, 2)
    assert kept == [[*range(16)], [*range(16, 32)]]
    for cpus, of in ((set(range(32)), 3), ({1, 4, 5}, 2), ({0, 1}, 2), ({7}, 3), ({2, 3}, 1)):
        kept.clear()
        for index in range(of):
            environment.keep_to_share(index, of)
        assert set().union(*kept) == cpus and all(kept)
        assert sum(map(len, kept)) == len(cpus) or len(cpus) < of


def test_two_processes_share_the_files_and_one_table_comes_out(project, photos):
    _, alone = label(photos, project)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "predict.py", photos, "--out", photos.parent / "two.csv", "--device", "cpu"]
    command += ["--weights", project / "weights", "--results", photos.parent / "no results"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    two = read(photos.parent / "two.csv")
    assert [row["path"] for row in two] == [row["path"] for row in alone]
    assert [row["class"] for row in two] == [row["class"] for row in alone]
    assert done.stdout.count("written: ") == 1 and not list(photos.parent.glob("*.part*"))


@pytest.mark.skipif(os.name == "nt", reason="signals to a process are POSIX's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_ends_when_told(tmp_path, how):
    """The second of two processes; this one stands for the first, and never answers."""
    store = torch.distributed.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    script = tmp_path / "waits.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\n\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import predict\nimport torch.distributed\n\nPath({str(tmp_path / 'here')!r}).touch()\n"
        "predict.run_main(lambda: predict.gather(None))\n",
        encoding="utf-8",
    )
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    started = start_script(script, env=ranks)
    try:
        while not (tmp_path / "here").exists():
            assert started.poll() is None
            time.sleep(0.1)
        time.sleep(1)  # by then it waits inside torch
        started.send_signal(how)
        assert started.wait(timeout=15) != 0
    finally:
        started.kill()


def test_processes_that_exchanged_something_can_leave(tmp_path):
    """Twenty times, as PyTorch before 2.8 hung in one of a few."""
    script = tmp_path / "leaves.py"
    script.write_text(
        f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.distributed as dist\nfrom utils import devices\n\n"
        "for number in range(20):\n"
        f"    store = dist.FileStore({str(tmp_path)!r} + f'/store{{number}}', 2)\n"
        "    dist.init_process_group('gloo', store=store, rank=int(sys.argv[1]), world_size=2)\n"
        "    dist.all_gather_object([None, None], 'x')\n"
        "    devices.leave_processes()\n",
        encoding="utf-8",
    )
    started = [start_script(script, str(rank)) for rank in range(2)]
    try:
        assert [one.wait(timeout=60) for one in started] == [0, 0]
    finally:
        for one in started:
            one.kill()
