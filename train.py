"""Train one ResNet-18 per image size and keep the best epoch of each.

Reads data/ (drawn by datasets.py where there is none), writes weights/best_resnet18_<size>.pth,
results/training.csv and training.png.  A size that was trained with the same settings on the same images is
skipped; an interrupted one resumes after its last whole epoch; a network of other images is kept as .pth.1.

    python train.py                                               all sizes, 10 epochs each
    python train.py --image-sizes 224 --epochs 10 --pretrained    one size, longer, from ImageNet's weights
    torchrun --nproc-per-node 2 train.py                          on two GPUs, or in two CPU processes
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
import argparse
import contextlib
import math
import time
from pathlib import Path

import datasets
from utils import devices
from utils.devices import RANK, print_rank0
from utils.environment import is_out_of_memory, torch_is_at_least
from utils.utils import (
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    check_folder,
    checkpoint_path,
    file_lock,
    number,
    remove_leftovers,
    rename_to_backup,
    run_main,
)

EPOCHS, BATCH_SIZE = 10, 8  # of small batches there are more: 90 steps on the sample heroes
LEARNING_RATE = 5e-4  # AdamW's peak; the best of 3e-4 to 4e-3, and better than SGD, on the sample heroes
WEIGHT_DECAY = 0.05
MOMENTUM = 0.2  # of batch norm's statistics; torch's 0.1 lags behind in so few steps
WARMUP = 0.2  # share of all steps in which the learning rate rises; then it falls to 0 along a cosine
REQUEST = ["epochs", "batch_size", "learning_rate", "seed", "pretrained"]  # what a checkpoint is made by


def learning_rate_at(progress: float, peak: float) -> float:
    """The rate after this share (0..1) of all steps."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


class Training:
    """One network's training, new or from the state at `last` if that is of these facts: classes, image_size,
    settings, data."""

    def __init__(self, facts: dict, device, last: Path):
        import torch

        import model

        self.settings, self.device = facts["settings"], device
        self.precision = devices.choose_precision(device)
        torch.manual_seed(self.settings["seed"])
        options: dict = {"memory_format": torch.channels_last}
        self.network = model.build(len(facts["classes"]), self.settings["pretrained"]).to(device, **options)
        for module in self.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = MOMENTUM
        rate, fused = self.settings["learning_rate"], device.type == "cuda" or torch_is_at_least(2, 4)
        weights = self.network.parameters()
        self.optimizer = torch.optim.AdamW(weights, rate, weight_decay=WEIGHT_DECAY, fused=fused)
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        self.scaler = make_scaler(enabled=self.precision == torch.float16)
        self.history, self.best = [], {}
        if state := matching(last, **facts):
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.history, self.best = state["history"], state["best"]
            print_rank0(f"{facts['image_size']} px: resuming after epoch {len(self.history)}")

    def train_one_epoch(self, network, batches, epoch: int) -> dict[str, float]:
        """One pass over the training images; loss, accuracy and speed are of all processes together."""
        import torch

        network.train()
        start, device = time.perf_counter(), self.device
        loss_sum, correct, count, steps = 0.0, 0.0, 0, len(batches)
        mixed = torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
        for step, (images, labels) in enumerate(batches):
            images = images.to(device, memory_format=torch.channels_last)  # (N, 3, S, S)
            labels = labels.to(device)
            progress = (epoch - 1 + (step + 0.5) / steps) / self.settings["epochs"]
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(progress, self.settings["learning_rate"])
            with mixed:
                logits = network(images)  # (N, classes)
                loss = torch.nn.functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss_sum += loss.detach() * len(labels)  # on the device: to read it each step makes the GPU wait
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        # This waits for the device, so the clock stops when all is done.
        loss_sum, correct, count = devices.sum_over_ranks(loss_sum, correct, count, device=device)
        seconds = time.perf_counter() - start
        row = {"train_loss": loss_sum / count, "train_accuracy": correct / count}
        return row | {"seconds": seconds, "images_per_s": count / seconds}


def evaluate(network, batches, device) -> dict[str, float]:
    """Loss and accuracy on the whole test set in FP32; folded batch norm saves a CPU a sixth of the time."""
    import torch

    import model

    network = model.fold_batch_norm(network)
    loss_sum, correct, count = 0.0, 0.0, 0
    with torch.inference_mode():
        for images, labels in batches:
            logits = network(images.to(device, memory_format=torch.channels_last))
            labels = labels.to(device)
            loss_sum += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    loss_sum, correct, count = devices.sum_over_ranks(loss_sum, correct, count, device=device)
    return {"test_loss": loss_sum / count, "test_accuracy": correct / count, "test_images": round(count)}


def matching(path: Path, **facts) -> dict | None:
    """The checkpoint or interrupted state at `path` if this very request made it from these images."""
    import model

    try:
        network, found = model.load(path)
    except UserError:  # missing, cut short, or of another program: train anew
        return None
    whole = found | {"model": network.state_dict()}
    return whole if all(found.get(name) == value for name, value in facts.items()) else None


def train_size(facts: dict, device, batch_size: int, *where) -> list:
    """train_network(), with half the batch as often as memory does not suffice."""
    while True:
        try:
            return train_network(facts, device, batch_size, *where)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller, what = max(batch_size // 2, 2), f"{facts['image_size']} px: out of memory at batch size"
            if smaller == batch_size or devices.PROCESSES > 1:  # the other processes wait for this one
                raise UserError(f"{what} {batch_size}; lower it, or the --image-sizes") from error
        print_rank0(f"{what} {batch_size}; going on with {smaller}")
        batch_size = smaller


def train_network(facts: dict, device, batch_size: int, data: Path, weights: Path, workers: int) -> list:
    """Train one network or resume it, write its best epoch; a row for each.  UserError if it diverges."""
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    import model

    size, settings = facts["image_size"], facts["settings"]
    best_path, last = checkpoint_path(weights, size), checkpoint_path(weights, size, "last")
    processes, images = devices.PROCESSES, facts["data"]
    asked = facts["classes"], size, max(2, batch_size // processes), workers
    train_batches = datasets.Loader(data, "train", *asked, settings["seed"], part=(RANK, processes))
    test_batches = datasets.Loader(data, "test", *asked, part=(RANK, processes))
    training = Training(facts, device, last)
    network = DistributedDataParallel(training.network) if processes > 1 else training.network
    kind = str(training.precision).removeprefix("torch.")
    made_by = dict(device=devices.hardware(device), precision=kind, processes=processes)
    made_by |= dict(train_images=images["train_images"], data=images["fingerprint"], sample=images["sample"])
    for epoch in range(len(training.history) + 1, settings["epochs"] + 1):
        train_batches.epoch = epoch
        label = f"{size} px, epoch {epoch}/{settings['epochs']}"
        bar = tqdm(train_batches, label, leave=False, unit="batch", disable=True if RANK else None)
        row = {"image_size": size, "epoch": epoch, **training.train_one_epoch(network, bar, epoch)}
        if not math.isfinite(row["train_loss"]):
            mend = f"lower the rate: python train.py --learning-rate {settings['learning_rate'] / 4:.1g}"
            raise UserError(f"training at {size} px diverged; {mend}")
        devices.average_statistics(training.network)
        row |= evaluate(training.network, test_batches, device) | made_by
        training.history.append(row)
        accuracy, loss, best = row["test_accuracy"], row["test_loss"], training.best
        if not best or (accuracy, -loss) > (best["accuracy"], -best["loss"]):
            kept = {name: value.cpu().clone() for name, value in training.network.state_dict().items()}
            training.best = {"epoch": epoch, "accuracy": accuracy, "loss": loss, "model": kept}
        if RANK == 0:
            state = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
            model.save(last, training.network, **facts, **state, best=training.best, history=training.history)
        losses = f"training loss {row['train_loss']:.3f}, test loss {loss:.3f}"
        speed = f"{row['images_per_s']:.1f} images/s"
        print_rank0(f"{label}: {losses}, test accuracy {accuracy:.1%}, {speed}")  # only once it is saved
    best = training.best
    if RANK == 0:
        if best_path.exists() and not matching(best_path, data=images):
            print(f"{best_path} was not trained on these images; it is kept as {rename_to_backup(best_path)}")
        training.network.load_state_dict(best["model"])
        chosen = dict(epoch=best["epoch"], accuracy=best["accuracy"], history=training.history)
        model.save(best_path, training.network, **facts, **chosen)
        last.unlink(missing_ok=True)
    accuracy = f"test accuracy {best['accuracy']:.1%} of {images['test_images']} images"
    print_rank0(f"{size} px: best epoch {best['epoch']}, {accuracy} -> {best_path}")
    return training.history


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--image-sizes", type=number(int, 32, 4096), nargs="+", help=f"in pixels (default: {IMAGE_SIZES})")
    add("--epochs", type=number(int, 1, 10_000), help=f"per size (default: {EPOCHS})")
    images = number(int, 2, 65_536)  # batch norm needs two
    add("--batch-size", type=images, default=BATCH_SIZE, help="images per step, of all processes together")
    add("--learning-rate", type=number(float, 1e-9, 10.0), default=LEARNING_RATE, help="its peak")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--workers", type=number(int, 0, 256), default=4, help="threads that read images")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--pretrained", action="store_true", help="start from ImageNet's weights (a download)")
    add("--force", action="store_true", help="train again what is already trained")
    add("--quick", action="store_true", help="try everything out: 64 px, 1 epoch, into <results>/quick")
    add_path_arguments(parser)
    args = parser.parse_args()
    args.image_sizes = args.image_sizes or ([64] if args.quick else IMAGE_SIZES)
    args.epochs = args.epochs or (1 if args.quick else EPOCHS)
    return args


def main() -> None:
    args = arguments()
    device = devices.start_processes(args.device)
    from utils.report import training_log

    results, lock = args.results / "quick" if args.quick else args.results, contextlib.nullcontext()
    if RANK == 0:
        check_folder(args.weights)
        check_folder(results)
        training_log.read_table(results / "training.csv")
        datasets.ensure_data(args.data, args.seed)
        datasets.check_images(args.data)
        lock = file_lock(args.weights / ".train.lock", "training")
    devices.wait_for_all()
    images, classes = datasets.describe(args.data), sorted(datasets.list_images(args.data)["train"])
    kind = str(devices.choose_precision(device)).removeprefix("torch.")
    counts = f"{images['train_images']} training and {images['test_images']} test images"
    print_rank0(f"{devices.hardware(device)}, {kind}, {counts}{' (sample data)' if images['sample'] else ''}")
    with lock:
        if RANK == 0:
            remove_leftovers(args.weights, results)
        for size in dict.fromkeys(args.image_sizes):
            settings = {"image_size": size} | {name: getattr(args, name) for name in REQUEST}
            facts = dict(classes=classes, image_size=size, settings=settings, data=images)
            done = None if args.force else matching(checkpoint_path(args.weights, size), **facts)
            devices.wait_for_all()
            if done:
                rows, accuracy = done["history"], f"test accuracy {done['accuracy']:.1%}"
                print_rank0(f"{size} px: already trained, {accuracy} (--force trains again)")
            else:
                rows = train_size(facts, device, args.batch_size, args.data, args.weights, args.workers)
            if RANK == 0:
                training_log.write_results(results, rows)
    if devices.PROCESSES > 1:
        devices.leave_processes()


if __name__ == "__main__":
    run_main(main)
