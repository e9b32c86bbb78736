"""Train one ResNet-18 per image size and keep the best epoch of each.

Reads data/ (drawn by datasets.py where there is none), writes weights/best_resnet18_<size>.pth, results/training.csv and
results/training.png.  A size that is already trained just so is skipped; an interrupted one goes on after its last whole epoch.

    python train.py                                                 all sizes, 5 epochs each
    python train.py --image-sizes 224 --epochs 10 --pretrained      one size, longer, from ImageNet's weights
    torchrun --nproc-per-node 2 train.py                            the same on two GPUs, or in two CPU processes
"""

import argparse
import contextlib
import functools
import io
import math
import os
import time
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import datasets
import model as networks
from utils.utils import (
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    checkpoint_path,
    cpu_name,
    read_json,
    run_main,
    write_atomic,
    write_json,
)

EPOCHS, BATCH_SIZE = 5, 8  # 8 learns from 18 sample heroes a class what 16 does from 24
LEARNING_RATE = (
    5e-4  # AdamW's peak; the best of 3e-4 to 4e-3, and better than SGD, on the sample heroes in 5 epochs
)
WEIGHT_DECAY = 0.05
MOMENTUM = 0.2  # of batch norm's statistics; at torch's 0.1 they lag behind the weights in so few steps (95 instead of 98 % right)
WARMUP = 0.2  # share of all steps in which the learning rate rises; then it falls to 0 along a cosine
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe and Ito, safe for colour-blind readers


def start_processes(name: str) -> torch.device:
    """The device of this process; joins the others where torchrun started it.  Raises UserError."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} can't be used here ({reason}); run on the CPU: python train.py --device cpu"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if several:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: torch.Tensor | int, device: torch.device) -> list[float]:
    total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def choose_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has it, float16 on older GPUs, else float32: bfloat16 that is emulated is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        native = getattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in flags
        )  # torch 2.2 has no such question
        return torch.bfloat16 if native() else torch.float32
    return torch.float32


def hardware(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )


def learning_rate_at(progress: float, peak: float) -> float:
    """The rate after this share (0..1) of all steps."""
    return peak * (
        progress / WARMUP
        if progress < WARMUP
        else 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))
    )


def train_one_epoch(model, batches, optimizer, scaler, precision, device, rate_at) -> dict[str, float]:
    """One pass over the training images; loss, accuracy and speed are of all processes together.

    `rate_at` gives the learning rate at a share (0..1) of this epoch.
    """
    model.train()
    start = time.perf_counter()
    loss_sum, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    mixed = torch.autocast(device.type, precision) if precision != torch.float32 else contextlib.nullcontext()
    for step, (images, labels) in enumerate(batches):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, 3, S, S)
        labels = labels.to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = rate_at((step + 0.5) / len(batches))
        with mixed:
            logits = model(images)  # (N, classes)
            loss = cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss_sum += loss.detach() * len(
            labels
        )  # summed on the device: to read it at each step would make the GPU wait
        correct += (logits.detach().argmax(1) == labels).sum()
        count += len(labels)
    loss_sum, correct, count = sum_over_ranks(loss_sum, correct, count, device=device)  # waits for the device
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "seconds": seconds,
        "images_per_s": count / seconds,
    }


@torch.inference_mode()
def evaluate(network, batches, device) -> dict[str, float]:
    """Loss and accuracy on the whole test set, every image once, in FP32; batch norm is folded, which saves a CPU a sixth of the time."""
    network = networks.fold_batch_norm(network)
    loss_sum, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        logits = network(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        labels = labels.to(device, non_blocking=True)
        loss_sum += cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        count += len(labels)
    loss_sum, correct, count = sum_over_ranks(loss_sum, correct, count, device=device)
    return {"test_loss": loss_sum / count, "test_accuracy": correct / count, "test_images": round(count)}


def average_statistics(network: torch.nn.Module) -> None:
    """Each process saw other images: give all the mean of their batch norm statistics, or each would test another network."""
    if dist.is_initialized():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def load_matching(path: Path, settings: dict, images: dict) -> dict | None:
    """The checkpoint or the interrupted state at `path` if it was made by this very request from these images."""
    try:
        found = networks.read(path)
    except UserError:  # missing, cut short, or of another program: train anew
        return None
    return found if found.get("settings") == settings and found.get("data") == images else None


def train_size(
    settings: dict,
    data: Path,
    weights: Path,
    images: dict,
    device: torch.device,
    precision: torch.dtype,
    workers: int,
) -> list:
    """Train one network, write its best epoch, return one row per epoch; goes on where it was interrupted.  Raises UserError."""
    size, epochs, peak = settings["image_size"], settings["epochs"], settings["learning_rate"]
    best_path, last_path = checkpoint_path(weights, size), weights / f"last_resnet18_{size}.pth"
    processes = dist.get_world_size() if dist.is_initialized() else 1
    batch_size = max(
        1, settings["batch_size"] // processes
    )  # the batch of all processes together stays the same
    train_loader, test_loader, classes = datasets.make_loaders(
        data, size, batch_size, workers, settings["seed"], rank(), processes, pin_memory=device.type == "cuda"
    )
    torch.manual_seed(settings["seed"])
    network = networks.build(len(classes), settings["pretrained"]).to(
        device, memory_format=torch.channels_last
    )
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = MOMENTUM
    fused = (
        device.type == "cuda"
        or device.type == "cpu"
        and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=WEIGHT_DECAY, fused=fused)
    scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)(enabled=precision == torch.float16)
    facts = {"classes": classes, "image_size": size, "settings": settings, "data": images}
    history, best = [], None
    if state := load_matching(last_path, settings, images):
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history, best = state["history"], state["best"]
        say(f"{size} px: going on after epoch {len(history)}")
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    for epoch in range(len(history) + 1, epochs + 1):
        train_loader.sampler.set_epoch(epoch)
        label = f"{size} px, epoch {epoch}/{epochs}"
        bar = tqdm(train_loader, label, leave=False, unit="batch", disable=True if rank() else None)
        rate_at = functools.partial(
            lambda share, done: learning_rate_at((done + share) / epochs, peak), done=epoch - 1
        )
        row = {
            "image_size": size,
            "epoch": epoch,
            **train_one_epoch(model, bar, optimizer, scaler, precision, device, rate_at),
        }
        if not math.isfinite(row["train_loss"]) or scaler.is_enabled() and scaler.get_scale() < 1:
            if precision == torch.float16:  # some GPUs of the GTX 16 series are known to compute NaN in FP16
                say(f"{size} px: FP16 gives no finite numbers on this GPU; starting this size again in FP32")
                wait_for_all()
                last_path.unlink(missing_ok=True)
                return train_size(settings, data, weights, images, device, torch.float32, workers)
            raise UserError(
                f"training at {size} px diverged; lower the rate: python train.py --learning-rate {peak / 4:.1g}"
            )
        average_statistics(network)
        row |= evaluate(network, test_loader, device)
        row |= {
            "device": hardware(device),
            "precision": str(precision).removeprefix("torch."),
            "processes": processes,
        }
        history.append(
            row
            | {
                "train_images": images["train_images"],
                "data": images["fingerprint"],
                "sample": images["sample"],
            }
        )
        say(
            f"{label}: training loss {row['train_loss']:.3f}, test loss {row['test_loss']:.3f}, "
            f"test accuracy {row['test_accuracy']:.1%}, {row['seconds']:.1f} s, {row['images_per_s']:.1f} images/s"
        )
        if best is None or (row["test_accuracy"], -row["test_loss"]) > (best["accuracy"], -best["loss"]):
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
            best = {
                "epoch": epoch,
                "accuracy": row["test_accuracy"],
                "loss": row["test_loss"],
                "model": tensors,
            }
        if rank() == 0:
            resumable = {
                "best": best,
                "history": history,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }
            networks.save(last_path, network, **facts, **resumable)
    if rank() == 0:
        network.load_state_dict(best["model"])
        networks.save(
            best_path, network, **facts, epoch=best["epoch"], accuracy=best["accuracy"], history=history
        )
        last_path.unlink(missing_ok=True)
    say(
        f"{size} px: best epoch {best['epoch']}, test accuracy {best['accuracy']:.1%} of {images['test_images']} images -> {best_path}"
    )
    return history


def write_results(results: Path, rows: list[dict]) -> None:
    """Merge the rows by image size into training.csv, so that other sizes keep theirs, and draw training.png from it."""
    path, table = results / "training.csv", pd.DataFrame(rows)
    if path.exists():
        old = pd.read_csv(path, dtype={"data": str})
        table = pd.concat([old[~old["image_size"].isin(table["image_size"])], table])
    table = table.sort_values(["image_size", "epoch"], ignore_index=True)
    write_atomic(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    picture = io.BytesIO()
    draw_chart(table).savefig(picture, dpi=120)
    write_atomic(results / "training.png", picture.getvalue())


def draw_chart(table: pd.DataFrame) -> Figure:
    """Loss and accuracy per epoch; one colour per image size, the test set solid, training dotted."""
    figure = Figure(figsize=(11, 5))
    for axis, (quantity, scale, unit) in zip(
        figure.subplots(1, 2), [("loss", 1, "nats"), ("accuracy", 100, "%")], strict=True
    ):
        ends = []
        for index, (size, rows) in enumerate(table.groupby("image_size")):
            colour, test = COLOURS[index % len(COLOURS)], scale * rows[f"test_{quantity}"]
            axis.plot(rows["epoch"], test, color=colour, marker="o", linewidth=2)
            axis.plot(rows["epoch"], scale * rows[f"train_{quantity}"], color=colour, linestyle=":")
            ends.append((test.iloc[-1], f"{size} px", colour))
        axis.set_ylim(0, 102 if quantity == "accuracy" else None)
        axis.set_xticks(range(1, table["epoch"].max() + 1))
        axis.set(
            xlabel="epoch",
            ylabel=f"{quantity} ({unit})",
            title=f"{quantity}: test set solid, training dotted",
        )
        axis.spines[["top", "right"]].set_visible(False)
        place = -1.0
        for y, name, colour in sorted(ends):  # each line's name at its end, moved up where two would overlap
            place = max(y / axis.get_ylim()[1], place + 0.05)
            axis.text(
                1.02, place, name, transform=axis.transAxes, color=colour, va="center", fontweight="bold"
            )
    best = 100 * table.groupby("image_size")["test_accuracy"].max()
    span = " to ".join(dict.fromkeys([f"{best.min():.0f}", f"{best.max():.0f}"]))
    figure.suptitle(
        f"ResNet-18 classifies up to {span} % of the test images right within {table['epoch'].max()} epochs",
        fontsize=14,
    )
    made = [
        f"{row.device}, {row.precision}; {row.train_images} training and {row.test_images} test images"
        for row in table.itertuples()
    ]
    sample = " · sample data (drawn heroes)" if table["sample"].any() else ""
    figure.text(0.01, 0.015, "; ".join(dict.fromkeys(made)) + sample, fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-sizes", type=int, nargs="+", help=f"pixels, square (default: {IMAGE_SIZES})")
    parser.add_argument("--epochs", type=int, help=f"per size (default: {EPOCHS})")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help="images per step, of all processes together"
    )
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="its peak")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--workers",
        type=int,
        default=4,
        help="processes that read images; 0: the training process reads them itself",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pretrained", action="store_true", help="start from ImageNet's weights (a download)"
    )
    parser.add_argument("--force", action="store_true", help="train again what is already trained")
    parser.add_argument(
        "--quick", action="store_true", help="try everything out: 64 px, 1 epoch, into <results>/quick"
    )
    add_path_arguments(parser)
    args = parser.parse_args()
    sizes = args.image_sizes or ([64] if args.quick else IMAGE_SIZES)
    epochs = args.epochs if args.epochs is not None else 1 if args.quick else EPOCHS
    if min(sizes) < 32 or epochs < 1 or args.batch_size < 1 or args.workers < 0:
        raise UserError(
            "--image-sizes from 32, --epochs and --batch-size from 1, --workers from 0 make sense; see: python train.py --help"
        )
    device = start_processes(args.device)
    if rank() == 0:
        datasets.ensure_data(args.data, args.seed)
        datasets.check_images(args.data)
    wait_for_all()
    listed = datasets.list_images(args.data)
    images = {f"{split}_images": sum(map(len, classes.values())) for split, classes in listed.items()}
    images |= {"fingerprint": datasets.fingerprint(args.data), "sample": datasets.is_sample(args.data)}
    precision = choose_precision(device)
    counts = f"{images['train_images']} training and {images['test_images']} test images{' (sample data)' if images['sample'] else ''}"
    say(f"{hardware(device)}, {str(precision).removeprefix('torch.')}, {counts}")
    common = {"epochs": epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    common |= {"seed": args.seed, "pretrained": args.pretrained}
    requests = [{"image_size": size, **common} for size in dict.fromkeys(sizes)]
    forced_path = (
        args.weights / "forced.json"
    )  # what --force has still to train: it, too, goes on after an interruption
    forced = (
        ([request for request in read_json(forced_path) or [] if request in requests] or requests[:])
        if args.force
        else []
    )
    for settings in requests:
        finished = (
            None
            if settings in forced
            else load_matching(checkpoint_path(args.weights, settings["image_size"]), settings, images)
        )
        wait_for_all()
        if finished:
            say(
                f"{settings['image_size']} px: already trained, test accuracy {finished['accuracy']:.1%} (--force trains again)"
            )
            rows = finished["history"]
        else:
            rows = train_size(settings, args.data, args.weights, images, device, precision, args.workers)
        if rank() == 0:
            write_results(args.results / "quick" if args.quick else args.results, rows)
            if settings in forced:
                forced.remove(settings)
                write_json(forced_path, forced) if forced else forced_path.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
