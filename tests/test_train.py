"""train.py at small settings: what it writes, what it skips, how it goes on after an interruption, and on
two processes."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, load_test_images, write_noise
from filelock import FileLock

import datasets
import model
import train
from utils import sample_images
from utils.utils import UserError, checkpoint_path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A project whose data are a few images of noise."""
    write_noise(tmp_path / "data")
    return tmp_path


def arguments(folder: Path, *more) -> list[str]:
    paths = [f"--{name}={folder / name}" for name in ("data", "weights", "results")]
    return [*paths, "--workers=0", "--device=cpu", *map(str, more)]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run train.py's main() in this process on `folder`; returns what it printed."""

    def run(*more) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, *more)])
        train.main()
        return capsys.readouterr().out

    return run


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "training.csv")


def test_quick_trains_one_small_size_and_is_not_repeated(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["train.py", "--quick"])
    train.main()
    said = capsys.readouterr().out
    assert said.count("already trained") == 1 and "epoch 1/1" not in said
    table = pd.read_csv(project / "results" / "quick" / "training.csv")
    assert table[["image_size", "epoch"]].values.tolist() == [[64, 1]]
    assert (project / "results" / "quick" / "training.png").stat().st_size > 10_000
    assert table["sample"].all() and (table["test_images"] == 100).all() and (table["images_per_s"] > 0).all()
    facts = model.load_facts(checkpoint_path(project / "weights", 64))
    assert facts["classes"] == sorted(sample_images.HEROES) and facts["image_size"] == 64
    assert facts["accuracy"] == pytest.approx(table["test_accuracy"][0], abs=1e-5)
    expected = {
        "fingerprint": datasets.fingerprint(project / "data"),
        "sample": True,
        "train_images": 72,
        "test_images": 100,
    }
    assert facts["data"] == expected and facts["settings"]["epochs"] == 1


def test_the_checkpoint_is_the_network_that_was_tested(folder, run):
    run("--image-sizes", 32, "--epochs", 2)
    network, facts = model.load(checkpoint_path(folder / "weights", 32), "cpu")
    images, labels = load_test_images(folder / "data", 32, facts["classes"])
    with torch.inference_mode():
        correct = (network(images).argmax(1) == labels).float().mean().item()
    assert correct == pytest.approx(facts["accuracy"])


def test_retraining_one_size_keeps_the_rows_of_the_others(folder, run):
    run("--image-sizes", 32, 40, "--epochs", 1)
    before = rows_of(folder)
    assert "already trained" in run("--image-sizes", 40, "--epochs", 1)
    said = run("--image-sizes", 32, "--epochs", 2)  # another request: trained, not skipped
    assert "already trained" not in said
    after = rows_of(folder)
    assert after[["image_size", "epoch"]].values.tolist() == [[32, 1], [32, 2], [40, 1]]
    pd.testing.assert_series_equal(after.iloc[2], before.iloc[1], check_names=False)
    (folder / "results" / "training.csv").unlink()
    run("--image-sizes", 40, "--epochs", 1)  # skipped, and its rows come from the checkpoint
    pd.testing.assert_series_equal(rows_of(folder).iloc[0], before.iloc[1], check_names=False)


def test_other_images_and_force_train_again(folder, run):
    run("--image-sizes", 32, 40, "--epochs", 1)
    assert "epoch 1/1" in run("--image-sizes", 32, 40, "--epochs", 1, "--force")
    data = folder / "data"
    shutil.copy(data / "test" / "тёмный" / "0.png", data / "train" / "тёмный" / "new.png")
    first = checkpoint_path(folder / "weights", 32)
    before = first.read_bytes()
    said = run("--image-sizes", 32, "--epochs", 1)
    assert (
        "epoch 1/1" in said and "best_resnet18_32.pth was not trained on these images; it is kept as" in said
    )
    assert first.with_name(f"{first.name}.1").read_bytes() == before != first.read_bytes()


def test_an_interrupted_run_goes_on_after_its_last_epoch(folder, run, monkeypatch):
    request, say = ["--image-sizes", 32, "--epochs", 6], train.print_rank0
    last = folder / "weights" / "last_resnet18_32.pth"

    def say_and_stop(text: str) -> None:
        say(text)
        if "epoch 2/6" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "print_rank0", say_and_stop)
        run(*request)
    done = model.load_facts(last)["history"]
    assert len(done) == 2 and not checkpoint_path(folder / "weights", 32).exists()
    said = run(*request)
    assert "resuming after epoch 2" in said and "epoch 3/6" in said
    history = model.load_facts(checkpoint_path(folder / "weights", 32))["history"]
    assert [row["epoch"] for row in history] == list(range(1, 7)) and history[: len(done)] == done
    assert not last.exists() and len(rows_of(folder)) == 6
    # In one go; any number of workers sees the same.
    run(*request, "--weights", folder / "again", "--workers", 1)
    straight = model.load_facts(checkpoint_path(folder / "again", 32))["history"]
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert [row[name] for row in straight] == [row[name] for row in history]


def test_a_damaged_or_foreign_state_is_not_gone_on_from_and_a_foreign_network_kept(folder, run):
    best, last = (checkpoint_path(folder / "weights", 32, which) for which in ("best", "last"))
    best.parent.mkdir()
    torch.save({"conv1.weight": torch.zeros(1)}, best)  # somebody's own network
    last.write_bytes(b"cut short")
    before = best.read_bytes()
    assert "32 px, epoch 1/1" in run("--image-sizes", 32, "--epochs", 1)
    assert model.load_facts(best)["epoch"] == 1 and not last.exists()
    assert best.with_name(f"{best.name}.1").read_bytes() == before


def test_a_checkpoint_of_other_classes_is_trained_again(folder, run):
    request = ["--image-sizes", 32, "--epochs", 1]
    run(*request)
    path = checkpoint_path(folder / "weights", 32)
    known = torch.load(path, weights_only=True)
    torch.save({**known, "classes": ["a", "b"]}, path)
    assert "epoch 1/1" in run(*request)
    assert model.load_facts(path)["classes"] == ["светлый", "тёмный"]


@pytest.mark.parametrize("batch_size", [9, 3, 1000])
def test_any_batch_size_works(run, batch_size):
    assert "best epoch 1" in run("--image-sizes", 32, "--epochs", 1, "--batch-size", batch_size)


def test_two_processes_train_one_network(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train.py"), *arguments(folder, "--image-sizes", 32, "--epochs", 2)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*command, "--batch-size", "4"], env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 1
    table = rows_of(folder)
    assert (table["processes"] == 2).all() and (table["test_images"] == 7).all() and len(table) == 2
    network, facts = model.load(checkpoint_path(folder / "weights", 32), "cpu")
    images, labels = load_test_images(folder / "data", 32, facts["classes"])
    with torch.inference_mode():
        logits = network(images)
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(facts["accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(table["test_loss"][facts["epoch"] - 1], rel=1e-3)
    assert sorted(path.name for path in (folder / "weights").glob("[!.]*")) == ["best_resnet18_32.pth"]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of memory as Linux has it")
def test_out_of_memory_halves_the_batch(folder):
    """The process may take 0.95 GB more than it has, and ten images at once need more than that.

    Afterwards the limit is lifted, since so near to it native code may crash instead of saying so.
    """
    code = f"""import sys, resource, psutil
sys.path.insert(0, {str(ROOT)!r}); sys.argv = ["train.py", *{arguments(folder, "--image-sizes", 384)!r}]
sys.argv += ["--epochs", "1", "--batch-size", "10"]
import train, torch, torch.fx.experimental.optimization
torch.set_num_threads(1); train.devices.choose_precision = lambda device: torch.float32
most = psutil.Process().memory_info().vms + 950 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
def say(text):
    print(text, flush=True)
    if "out of memory" in text:
        resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
train.print_rank0 = say
train.run_main(train.main)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "384 px: out of memory at batch size 10; going on with 5" in done.stdout
    assert model.load_facts(checkpoint_path(folder / "weights", 384))["settings"]["batch_size"] == 10


def test_a_second_training_waits_for_the_first_or_says_so(folder, run, monkeypatch):
    monkeypatch.setattr(train, "file_lock", functools.partial(train.file_lock, patience=0.1))
    (folder / "weights").mkdir()
    held = FileLock(folder / "weights" / ".train.lock")
    with held, pytest.raises(UserError, match="another process is training in .*weights"):
        run("--image-sizes", 32, "--epochs", 1)
    assert "best epoch" in run("--image-sizes", 32, "--epochs", 1)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [train.learning_rate_at(step / 100, 2.0) for step in range(101)]
    assert rates[0] == 0 and rates[20] == max(rates) == pytest.approx(2)
    assert rates[60] == pytest.approx(1) and rates[100] == pytest.approx(0)


def test_mistakes_are_one_sentence(folder, run):
    with pytest.raises(SystemExit, match="2"):
        run("--epochs", 0)
    (folder / "data" / "train" / "тёмный" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="0.png"):
        run("--image-sizes", 32)
