"""Are the sample heroes worth learning?  Run by hand; trains at 224 px, about a minute on 2 AVX-512 cores.

Draws the sample in a temporary folder, trains on it with the real train.py and prints two figures: the test
accuracy after all epochs from random weights (at least 80 %), and that of a classifier that only knows each
class's mean colour (under 60 %).  Exit code 1 if either bound fails.

    python tests/check_sample_data.py
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import model  # noqa: E402
from utils.images import load_rgb  # noqa: E402
from utils.utils import checkpoint_path  # noqa: E402


def mean_colours(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) mean RGB and (N,) class names of a split."""
    listed = datasets.list_images(data)[split]
    colours = [np.asarray(load_rgb(path)).mean((0, 1)) for images in listed.values() for path in images]
    return np.array(colours), np.array([name for name, images in listed.items() for _ in images])


def colour_accuracy(data: Path) -> float:
    """Test accuracy of choosing the class whose mean colour in the training set is the nearest."""
    train, train_names = mean_colours(data, "train")
    test, test_names = mean_colours(data, "test")
    classes = np.unique(train_names)
    centres = np.stack([train[train_names == name].mean(0) for name in classes])
    nearest = np.linalg.norm(test[:, None] - centres[None], axis=2).argmin(1)
    return float((classes[nearest] == test_names).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn sample and of the training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, weights, results = (Path(folder, name) for name in ("data", "weights", "results"))
        datasets.draw_sample(data, args.seed)
        colour = colour_accuracy(data)
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--image-sizes",
            str(args.image_size),
            "--seed",
            str(args.seed),
        ]
        subprocess.run(
            [*command, "--data", str(data), "--weights", str(weights), "--results", str(results)], check=True
        )
        facts = model.load_facts(checkpoint_path(weights, args.image_size))
    epochs, last = len(facts["history"]), facts["history"][-1]["test_accuracy"]
    after = f"{last:.1%} after {epochs} epochs, {facts['accuracy']:.1%} at best (at least 80 %)"
    print(f"test accuracy at {args.image_size} px: {after}")
    print(f"nearest mean colour: {colour:.1%} (under 60 %)")
    sys.exit(0 if last >= 0.8 and colour < 0.6 else 1)


if __name__ == "__main__":
    main()
