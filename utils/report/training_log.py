"""What training leaves for people: training.csv, a row per image size and epoch, and its chart."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from utils.report.chart_style import dress, legend, sheet, write_png
from utils.report.names import PALETTE
from utils.report.tables import load_csv
from utils.report.words import SAMPLE
from utils.utils import write_atomic

COLUMNS = ["image_size", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
COLUMNS += ["train_images", "test_images", "device", "precision", "data", "sample"]


def read_table(path: Path) -> pd.DataFrame | None:
    """training.csv, or None where there is none.  Raises UserError where it is not what train.py wrote."""
    mend = "move it away, then run the same command again"
    return load_csv(path, COLUMNS, mend) if path.exists() else None


def write_results(results: Path, rows: list[dict]) -> None:
    """Merge the rows into training.csv, where other sizes keep theirs, and draw training.png from it."""
    path, table = results / "training.csv", pd.DataFrame(rows)
    old = read_table(path)
    if old is not None:
        table = pd.concat([old[~old["image_size"].isin(table["image_size"])], table])
    table = table.sort_values(["image_size", "epoch"], ignore_index=True)
    write_atomic(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    write_png(draw_chart(table), results / "training.png")


def draw_chart(table: pd.DataFrame) -> Figure:
    """Loss and accuracy per epoch; one colour per image size, the test set solid, training dotted."""
    best = 100 * table.groupby("image_size")["test_accuracy"].max()
    span = " to ".join(dict.fromkeys([f"{best.min():.0f}", f"{best.max():.0f}"]))
    made = table[["device", "precision", "train_images", "test_images"]].drop_duplicates().values
    texts = [f"{on}, {kind}; {train} training and {test} test images" for on, kind, train, test in made]
    texts += [SAMPLE.capitalize()] if table["sample"].any() else []
    epochs = "one epoch" if table["epoch"].max() == 1 else f"{table['epoch'].max()} epochs"
    title = f"ResNet-18 classifies up to {span} % of the test images right within {epochs}"
    figure, part = sheet(4.4, title, [*texts, "Solid: test set; dotted: training"])
    axes = part.subplots(1, 2)
    for ax, quantity, unit, scale in zip(axes, ("loss", "accuracy"), ("nats", "%"), (1, 100), strict=True):
        for index, (size, rows) in enumerate(table.groupby("image_size")):
            look = {"color": PALETTE[index % len(PALETTE)]}
            ax.plot(rows["epoch"], scale * rows[f"test_{quantity}"], marker="o", label=f"{size} px", **look)
            ax.plot(rows["epoch"], scale * rows[f"train_{quantity}"], linestyle=":", **look)
        ax.set_ylim(0, 1.05 * ax.dataLim.y1)
        ax.set_xlim(0.5, table["epoch"].max() + 0.5)
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)
        dress(ax, "epoch", f"{quantity} ({unit})")
    legend(part, axes[0], columns=4)
    return figure
