"""What training leaves for people: training.csv, a row per image size and epoch, and its chart."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from utils.report.chart_style import write_png
from utils.report.names import PALETTE
from utils.report.tables import load_csv, no_table
from utils.report.words import SAMPLE
from utils.utils import write_atomic

NUMBERS = ["image_size", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
NUMBERS += ["train_images", "test_images"]
TEXTS = ["device", "precision", "sample"]


def read_table(path: Path) -> pd.DataFrame | None:
    """training.csv, or None where there is none.  Raises UserError where it is not what train.py wrote."""
    mend = "move it away, then run the same command again"
    try:
        table = load_csv(path, ["data"], mend)
        table.astype(dict.fromkeys(TEXTS, object) | dict.fromkeys(NUMBERS, float))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise no_table(path, error, mend) from error
    return table


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
    figure, epochs = Figure(figsize=(11, 5), dpi=120, layout="constrained"), table["epoch"].max()
    loss, accuracy = figure.subplots(1, 2)
    for index, (size, rows) in enumerate(table.groupby("image_size")):
        look = {"color": PALETTE[index % len(PALETTE)]}
        for axis, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            test, trained = scale * rows[f"test_{quantity}"], scale * rows[f"train_{quantity}"]
            axis.plot(rows["epoch"], test, marker="o", linewidth=2, label=f"{size} px", **look)
            axis.plot(rows["epoch"], trained, linestyle=":", **look)
    accuracy.set_ylim(0, 102)
    loss.set_ylim(0, None)
    for axis, quantity, unit in ((loss, "loss", "nats"), (accuracy, "accuracy", "%")):
        axis.set(xticks=range(1, epochs + 1), xlabel="epoch", ylabel=f"{quantity} ({unit})")
        axis.set_title(f"{quantity}: test set solid, training dotted")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", frameon=False)
    best = 100 * table.groupby("image_size")["test_accuracy"].max()
    span = " to ".join(dict.fromkeys([f"{best.min():.0f}", f"{best.max():.0f}"]))
    title = f"ResNet-18 classifies up to {span} % of the test images right within {epochs} epochs"
    figure.suptitle(title, fontsize=14)
    made = table[["device", "precision", "train_images", "test_images"]].drop_duplicates().values
    texts = [f"{on}, {kind}; {train} training and {test} test images" for on, kind, train, test in made]
    sample = f" · {SAMPLE}" if table["sample"].any() else ""
    figure.supxlabel("; ".join(texts) + sample, fontsize=8, x=0.01, ha="left")
    return figure
