"""What a figure depends on besides the code: a limit on the processor's time, variables, torch's build."""

import importlib.metadata
from pathlib import Path

import pytest

from utils import environment

GROUPS = {
    "v2": ("0::/docker/x\n", {"sys/fs/cgroup/docker/x/cpu.max": "50000 100000\n"}, "docker/x/cpu.stat"),
    "v2, its own group on top": ("0::/docker/x\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, "cpu.stat"),
    "v1": (
        "5:memory:/m\n1:cpu,cpuacct:/job\n0::/\n",
        {
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        "cpu/job/cpu.stat",
    ),
}


@pytest.mark.parametrize("named, files, stat", GROUPS.values(), ids=GROUPS)
def test_a_containers_limit_on_the_processors_time_is_read(tmp_path, named, files, stat):
    told = "nr_periods 7\nthrottled_time 2500000000\n" if "cpu/" in stat else "throttled_usec 2500000\n"
    for name, content in (files | {"proc/self/cgroup": named, f"sys/fs/cgroup/{stat}": told}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert environment.cpu_quota(tmp_path) == 0.5
    assert environment.throttled_s(tmp_path) == 2.5


def test_without_a_limit_there_is_no_quota(tmp_path):
    assert environment.cpu_quota(tmp_path) is None and environment.throttled_s(tmp_path) == 0


def test_variables_that_change_how_code_computes_are_named_and_caches_are_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/x")
    found = environment.deciding_variables()
    assert found["OMP_NUM_THREADS"] == "3" and found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "TORCHINDUCTOR_CACHE_DIR" not in found and "PATH" not in found


def test_torchs_version_names_its_build_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "torch-2.11.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
    found = importlib.metadata.PathDistribution(folder)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert environment.package_version("torch") == "2.11.0+cpu"
    assert environment.torch_is_at_least(2, 4) and environment.torch_is_at_least(2, 11)
    assert not environment.torch_is_at_least(2, 12)


def test_on_a_cpu_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(
        environment, "describe", lambda: {"gpu": "NVIDIA GeForce GTX 1650", "driver": "581.15"}
    )
    told = environment.environment("cpu")
    assert told["gpu"] is None and "driver" not in told
    assert environment.environment("cuda")["gpu"] == "NVIDIA GeForce GTX 1650"
    assert Path(told["command"].split()[0]).name == "python"


def test_what_limits_the_processor_belongs_to_the_environment(monkeypatch):
    for name, value in {
        "cpu_quota": 0.5,
        "affinity": "0-3,8",
        "deciding_variables": {"OMP_WAIT": "x"},
    }.items():
        monkeypatch.setattr(environment, name, lambda value=value: value)
    told = environment.environment("cpu")
    assert (told["cpu_quota"], told["affinity"], told["variables"]) == (0.5, "0-3,8", {"OMP_WAIT": "x"})
