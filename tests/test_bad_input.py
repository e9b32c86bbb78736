"""Bad input through the real commands: exit code 2, the culprit named, no traceback, every file as it was.

Each line of CASES is one command in a copy of a small project that was trained and measured.  Most run in
this process; the first of every kind runs in a fresh one, as a user starts it.
"""

import hashlib
import os
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import run_here, run_script, shared_copy, shorten_benchmark

LARGE = 1 << 20  # bytes; what is larger is linked instead of copied, and known by its inode instead of a hash


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny) -> Path:
    """The tiny project, measured."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny, folder)
        short = ["--backends", "pytorch", "--rounds", 1, "--runs", 4, "--device", "cpu"]
        with pytest.MonkeyPatch.context() as patch:
            shorten_benchmark(patch)
            run_here("benchmark.py", "--quick", *short, cwd=folder)

    return shared_copy(tmp_path_factory, "whole", make)


def link_or_copy(source: str, target: str) -> str:
    small = Path(source).stat().st_size < LARGE
    return shutil.copy2(source, target) if small else os.link(source, target) or target


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "project", copy_function=link_or_copy))


def manifest(folder: Path) -> dict[str, object]:
    """Every file and folder with what tells a change; locks are no content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".lock"):
            continue
        known = path.lstat()
        if not path.is_file() or path.is_symlink():
            found[str(path)] = known.st_mode
        elif known.st_size < LARGE:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = known.st_ino, known.st_mtime_ns, known.st_size
    return found


# ---- how a project is damaged: each takes its folder

DARK, TEST = "data/train/тёмный", "data/test/тёмный"
BEST, TABLE = "weights/best_resnet18_64.pth", "results/quick/benchmark_results.csv"


def steps(*damages):
    def damage(folder: Path) -> None:
        for step in damages:
            step(folder)

    return damage


def remove(path: str):
    def damage(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)

    return damage


def put(path: str, content: bytes):
    """A file with this content instead of what is there."""

    def write(folder: Path) -> None:
        (folder / path).write_bytes(content)

    return steps(remove(path), write)


def make_folder(path: str):
    return steps(remove(path), lambda folder: (folder / path).mkdir())


def half(path: str):
    def damage(folder: Path) -> None:
        content = (folder / path).read_bytes()
        put(path, content[: len(content) // 2])(folder)

    return damage


def move(source: str, target: str):
    return lambda folder: (folder / source).rename(folder / target)


def only_a_pipe(folder: Path) -> None:
    make_folder(DARK)(folder)
    os.mkfifo(folder / DARK / "a.png")


def dangling(folder: Path) -> None:
    (folder / DARK / "link.png").symlink_to(folder / "gone.png")


def bomb(folder: Path) -> None:
    """A PNG of a few bytes that says it is 30000 x 30000."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    content = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    put(f"{DARK}/0.png", b"\x89PNG\r\n\x1a\n" + content)(folder)


def put_checkpoint(change):
    """The checkpoint as `change` makes it."""

    def damage(folder: Path) -> None:
        content = torch.load(str(folder / BEST), weights_only=True)
        remove(BEST)(folder)
        torch.save(change(content), folder / BEST)

    return damage


def without_a_layer(known: dict) -> dict:
    return {**known, "model": {name: value for name, value in known["model"].items() if "layer4" not in name}}


class Code:
    """Unpickled with trust this would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("code-was-run"),)


def head_alone(folder: Path) -> None:
    head = (folder / TABLE).read_text(encoding="utf-8").splitlines()[0]
    put(TABLE, head.encode() + b"\n")(folder)


# ---- the cases: (kind, script, arguments, damage, what the sentence must name)

BASE = {  # what makes each command small; what a case says comes after it and wins
    "train": "--quick --workers 0 --device cpu",
    "datasets": "",
    "benchmark": "--quick --backends pytorch --device cpu",
    "pytorch_inference": "--quick --device cpu",
    "onnx_inference": "--quick --device cpu",
    "tensorrt_inference": "--quick --device cpu",
    "end_to_end": "--results results/quick --seconds 0.1",
    "compare": "results/quick",
}
ARGUMENTS = {  # script -> flags -> values, one case each
    "train": {
        "--learning-rate": "nan, -1, 0, inf, 1e9, fast",
        "--seed": "-1, 4294967296, 99999999999999999999, 1.5",
        "--image-sizes": "0, -64, 31, 100000, 64px, 64 5",
        "--epochs": "0, -1, 1000000, five",
        "--batch-size": "0, 1, -8, 1000000000",
        "--workers": "-1, 100000",
        "--device": "nonsense, cuda:99, 7x",
        "--no-such-flag": "1",
    },
    "datasets": {"--seed": "x", "--no-such-flag": "1", "--draw-sample": "yes"},
    "benchmark": {"--timeout": "0, nan, -1", "--no-such-flag": "1"},
    "compare": {
        "--fail-if-slower": "nan, -5%, five, 5%",  # there is nothing to compare with
        "--best --max-latency-ms": "nan, -1, fast",
        "--best --max-memory-mb": "nan, -1",
        "--best --min-accuracy": "nan",
        "--max-latency-ms": "5",  # without --best nobody asks for it
        "--max-memory-mb": "9",
        "--min-accuracy": "0.5",
        "--no-such-flag": "1",
    },
    "end_to_end": {
        "--seconds": "0, nan, -1, long",
        "--image-sizes": "96, x",
        "--sweep": "nowhere",
        "--no-such-flag": "1",
    },
}
MEASURING = {  # all of benchmark.py; the scripts that share its parser try two
    "--image-sizes": "16, 0, -1, x, 96",
    "--batch-sizes": "0, -4, x, auto",
    "--runs": "0, -1, x",
    "--warmup": "0, -1",
    "--min-seconds": "nan, -1",
    "--max-seconds": "nan, -1",
    "--sustain-seconds": "nan, -1",
    "--device": "tpu",
    "--backends": "nonsense",
    "--sweep": "a/b, .., con, a.",
}
LAYOUTS = {  # damage, what is named; folders are looked at by every command that reads data/
    "no test": (remove("data/test"), "test"),
    "no train": (remove("data/train"), "train"),
    "a file": (put("data", b"x"), "data"),
    "empty": (make_folder("data/train/тёмный"), "тёмный"),
    "one class": (steps(remove("data/train/тёмный"), remove("data/test/тёмный")), "train"),
    "never trained": (move("data/train/тёмный", "elsewhere"), "тёмный"),
    "only a pipe": (only_a_pipe, "тёмный"),
    "no classes": (
        steps(remove("data/train"), make_folder("data/train"), put("data/train/a.png", b"x")),
        "train",
    ),
    "no split": (
        steps(move("data/train/тёмный", "data/Кот"), remove("data/train"), remove("data/test")),
        "train/<class>/",
    ),
}
IMAGES = {  # and images by those that read them
    "emptied": (put(f"{DARK}/0.png", b""), "0.png"),
    "cut short": (half(f"{DARK}/0.png"), "0.png"),
    "text": (put(f"{DARK}/0.png", b"no picture"), "0.png"),
    "another format's name": (put(f"{DARK}/0.jpg", b"\xff\xd8\xff\xe0 no more"), "0.jpg"),
    "link to nothing": (dangling, "link.png"),
    "30000 x 30000": (bomb, "0.png"),
    "a test image": (put(f"{TEST}/2.png", b""), "2.png"),
}
CHECKPOINTS = {
    "emptied": put(BEST, b""),
    "text": put(BEST, b"no network"),
    "cut short": half(BEST),
    "a folder": make_folder(BEST),
    "code": put(BEST, pickle.dumps(Code())),
    "weights alone": put_checkpoint(lambda known: known["model"]),
    "no classes": put_checkpoint(lambda known: {**known, "classes": None}),
    "classes are numbers": put_checkpoint(lambda known: {**known, "classes": [1, 2]}),
    "a class too many": put_checkpoint(lambda known: {**known, "classes": ["a", "b", "c"]}),
    "no size": put_checkpoint(lambda known: {"model": known["model"], "classes": known["classes"]}),
    "another size": put_checkpoint(lambda known: {**known, "image_size": 96}),
    "a list": put_checkpoint(lambda known: [1, 2]),
    "a layer is missing": put_checkpoint(without_a_layer),
}
FOLDERS = [  # script, damage, what is named
    ("train", steps(remove("weights"), put("weights", b"x")), "weights"),
    ("train", steps(remove("results"), put("results", b"x")), "results"),
    ("train", steps(remove("results/quick"), put("results/quick", b"x")), "quick"),
    ("train", make_folder("results/quick/training.csv"), "training.csv"),
    ("benchmark", steps(remove("results"), put("results", b"x")), "results"),
    ("benchmark", steps(remove("results/quick"), put("results/quick", b"x")), "quick"),
    ("benchmark", steps(remove("results/quick/raw"), put("results/quick/raw", b"x")), "raw"),
    ("benchmark", steps(remove("weights"), put("weights", b"x")), "weights"),
    ("compare", remove("results"), "results"),
    ("compare", make_folder(TABLE), "benchmark_results.csv"),
    ("end_to_end", remove("results"), "results"),
]
TABLES = {
    "emptied": put(TABLE, b""),
    "no table": put(TABLE, b"\x00\xff\xfe" * 50),
    "another table": put(TABLE, b"a,b\n1,2\n"),
    "head alone": head_alone,
    "not UTF-8": put(TABLE, "размер,число\n1,2\n".encode("cp1251")),
}
TRAINING_TABLES = [
    b"",
    b"a,b\n1,2\n",
    b"\x00\xff" * 40,
    b"image_size,epoch\nx,y\n",
    "размер\n".encode("cp1251"),
]


def argument_cases(script: str, flags: dict[str, str]) -> list[tuple]:
    """The sentence names the flag, with any dash or space between its words, or the thing that was named."""
    found = []
    for flag, values in flags.items():
        for value in values.split(", "):
            named = flag.rpartition("--")[2]
            culprit = [named.replace("-", "."), named.replace("warmup", "warm-up")]
            culprit += (
                [re.escape(value)] if value in ("96", "nowhere", "..", "a/b", "yes", "con", "a.") else []
            )
            found.append(("argument", script, f"{flag} {value}", None, "|".join(culprit)))
    return found


def cases() -> list[tuple]:
    found = []
    for script, flags in ARGUMENTS.items():
        found += argument_cases(script, flags)
    found += argument_cases("benchmark", MEASURING)
    for script in ("pytorch_inference", "onnx_inference", "tensorrt_inference"):
        found += argument_cases(script, {"--image-sizes": "16", "--backends": "nonsense"})
    # What shares a check is tried whole by one script, and by the others to see that they ask it.
    for script in ("datasets", "train", "benchmark", "pytorch_inference"):
        found.append(("data", script, "--data nowhere", None, "nowhere"))
        layouts = list(LAYOUTS.values())[: None if script == "datasets" else 3]
        found += [("data", script, "", damage, culprit) for damage, culprit in layouts]
    found += [("image", "datasets", "", damage, culprit) for damage, culprit in IMAGES.values()]
    found.append(("image", "train", "", *IMAGES["cut short"]))
    found.append(("image", "benchmark", "", *IMAGES["a test image"]))  # of the training images it needs none
    for script in ("benchmark", "pytorch_inference", "end_to_end"):
        damages = list(CHECKPOINTS.values())[: None if script == "benchmark" else 3]
        found += [("checkpoint", script, "", damage, "best_resnet18_64") for damage in damages]
    found += [("folder", script, "", damage, culprit) for script, damage, culprit in FOLDERS]
    for script in ("compare", "end_to_end"):
        found += [("table", script, "", damage, "benchmark_results.csv") for damage in TABLES.values()]
    for content in TRAINING_TABLES:
        found.append(("table", "train", "", put("results/quick/training.csv", content), "training.csv"))
    found.append(("table", "compare", "results results/quick", remove("results/x"), "results"))
    found.append(("table", "compare", "results/quick results/quick results/quick", None, "two"))
    found.append(("table", "compare", "--write-readme", None, "README.md"))
    return found


CASES = cases()
FIRST = {
    kind: next(case for case in CASES if case[0] == kind) for kind in dict.fromkeys(case[0] for case in CASES)
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_bad_input_is_one_sentence_and_nothing_is_touched(case, folder):
    kind, script, option, damage, culprit = case
    if damage:
        damage(folder)
    before = manifest(folder)
    run = run_script if case is FIRST[kind] else run_here
    done = run(f"{script}.py", *BASE[script].split(), *option.split(), cwd=folder, ok=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(culprit, done.stderr, re.IGNORECASE), done.stderr
    assert manifest(folder) == before


def test_there_are_enough_cases():
    assert len(CASES) >= 150 and {case[1] for case in CASES} == set(BASE)
