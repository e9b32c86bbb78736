"""predict.py on tens of thousands of files, some of them broken: its memory does not grow with them."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import start_script
from PIL import Image
from test_predict import images_of, read


@pytest.mark.slow
def test_ten_thousand_files_of_which_a_hundred_are_broken(project, tmp_path, broken):
    folder, random = tmp_path / "photos 1", np.random.default_rng(0)
    originals = images_of(project / "data" / "test")
    for k in range(9_900):
        path = folder / f"{k // 2_500}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(originals[k % 100]) as image:
            image.convert("RGB").resize((64, 64)).save(path, quality=int(random.integers(75, 95)))
    ways = [path for path in broken.values() if path.is_file()]
    for k in range(100):
        shutil.copy(ways[k % len(ways)], folder / f"{k % 4}" / f"broken {k} {ways[k % len(ways)].name}")
    most = 27 if torch.cuda.is_available() else 9  # a GPU is done with fewer before its buffers have grown
    folders = {k: tmp_path / f"photos {k}" for k in (1, 3, 9, 27) if k <= most}
    for k in list(folders)[1:]:
        for part in "abc":
            shutil.copytree(folders[k // 3], folders[k] / part, copy_function=os.link)
    peaks = [peak_mb(more, project, tmp_path / f"{k}.csv", 9_900 * k, 100 * k) for k, more in folders.items()]
    print(f"MB of all its processes: {np.round(peaks)} for {list(folders)} times the files")
    assert peaks[-2] < 1.25 * peaks[-3]  # buffers still grow for some seconds, DALI's more than Pillow's
    assert peaks[-1] < 1.1 * peaks[-2]  # then it does not grow with the files


def peak_mb(folder: Path, project: Path, out: Path, right: int, wrong: int) -> float:
    """MB at most of a run that writes so many rows and names so many broken files."""
    where = ["--out", out, "--weights", project / "weights", "--results", out.parent]
    with out.with_suffix(".stderr").open("w") as errors:
        started = start_script("predict.py", folder, *where, stderr=errors)
        peak = 0.0
        while started.poll() is None:
            peak = max(peak, memory(started.pid))
            time.sleep(0.2)
    said = out.with_suffix(".stderr").read_text("utf-8")
    assert started.returncode == 1 and "Traceback" not in said
    assert f"{wrong:,} files or folders can't be read" in said
    rows = read(out)
    assert len(rows) == right and not [row for row in rows if "broken" in row["path"]]
    return peak


def memory(pid: int) -> float:
    """MB that a process and its children hold, shared pages counted once."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(process.memory_full_info().pss for process in family) / 2**20
    except psutil.Error:
        return 0.0
