"""Train one ResNet-18 per image size and keep the best epoch of each.

Reads data/ (drawn by datasets.py where there is none), writes weights/best_resnet18_<size>.pth,
results/training.csv and training.png.  A size that was trained with the same settings on the same images is
skipped; an interrupted one resumes after its last whole epoch.

    python train.py                                               all sizes, 10 epochs each
    python train.py --image-sizes 224 --epochs 10 --pretrained    one size, longer, from ImageNet's weights
    torchrun --nproc-per-node 2 train.py                          on two GPUs, or in two CPU processes
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import contextlib
import itertools
import math
import time
from pathlib import Path

import datasets
from utils import devices
from utils.devices import print_rank0, rank
from utils.environment import is_out_of_memory
from utils.utils import (
    IMAGE_SIZES,
    MOST_WORKERS,
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
BEST_MB, LAST_MB = 45, 135  # a network; with the optimizer's state and the best epoch so far


def learning_rate_at(progress: float, peak: float) -> float:
    """The rate after this share (0..1) of all steps."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


class Training:
    """One network's training: saved after every epoch, resumed after an interruption."""

    def __init__(self, settings: dict, images: dict, classes: list[str], device, precision):
        import torch

        import model
        from utils.environment import torch_is_at_least

        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.precision = settings, device, precision
        options: dict = {"memory_format": torch.channels_last}
        self.network = model.build(len(classes), settings["pretrained"]).to(device, **options)
        for module in self.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = MOMENTUM
        rate, fused = settings["learning_rate"], device.type == "cuda" or torch_is_at_least(2, 4)
        weights = self.network.parameters()
        self.optimizer = torch.optim.AdamW(weights, rate, weight_decay=WEIGHT_DECAY, fused=fused)
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        self.scaler = make_scaler(enabled=precision == torch.float16)
        size = settings["image_size"]
        self.facts: dict = dict(classes=classes, image_size=size, settings=settings, data=images)
        self.history, self.best = [], {}

    def resume(self, path: Path) -> None:
        """Take over the state at `path` if it is of this very training."""
        if state := matching(path, **self.facts):
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.history, self.best = state["history"], state["best"]
            print_rank0(f"{self.facts['image_size']} px: resuming after epoch {len(self.history)}")

    def train_one_epoch(self, network, batches, epoch: int) -> dict[str, float]:
        """One pass over the training images; loss, accuracy and speed are of all processes together."""
        import torch
        from torch.nn.functional import cross_entropy

        network.train()
        start, device = time.perf_counter(), self.device
        loss_sum, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        mixed = torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
        for step, (images, labels) in enumerate(batches):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, 3, S, S)
            labels = labels.to(device, non_blocking=True)
            progress = (epoch - 1 + (step + 0.5) / len(batches)) / self.settings["epochs"]
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(progress, self.settings["learning_rate"])
            with mixed:
                logits = network(images)  # (N, classes)
                loss = cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss_sum += loss.detach() * len(labels)  # on the device: to read it each step makes the GPU wait
            correct += (logits.detach().argmax(1) == labels).sum()
            count += len(labels)
        # This waits for the device, so the clock stops when all is done.
        loss_sum, correct, count = devices.sum_over_ranks(loss_sum, correct, count, device=device)
        seconds = time.perf_counter() - start
        row = {"train_loss": loss_sum / count, "train_accuracy": correct / count}
        return row | {"seconds": seconds, "images_per_s": count / seconds}

    def note(self, row: dict) -> None:
        """Add an epoch; keep its weights if it is the best so far."""
        self.history.append(row)
        epoch, accuracy, loss = row["epoch"], row["test_accuracy"], row["test_loss"]
        if not self.best or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            weights = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}
            self.best = {"epoch": epoch, "accuracy": accuracy, "loss": loss, "model": weights}

    def save(self, path: Path, **facts) -> None:
        import model

        model.save(path, self.network, **self.facts, **facts, history=self.history)


def evaluate(network, batches, device) -> dict[str, float]:
    """Loss and accuracy on the whole test set in FP32; folded batch norm saves a CPU a sixth of the time."""
    import torch
    from torch.nn.functional import cross_entropy

    import model

    network = model.fold_batch_norm(network)
    loss_sum, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    with torch.inference_mode():
        for images, labels in batches:
            logits = network(images.to(device, non_blocking=True, memory_format=torch.channels_last))
            labels = labels.to(device, non_blocking=True)
            loss_sum += cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    loss_sum, correct, count = devices.sum_over_ranks(loss_sum, correct, count, device=device)
    return {"test_loss": loss_sum / count, "test_accuracy": correct / count, "test_images": round(count)}


def matching(path: Path, **facts) -> dict | None:
    """The checkpoint or interrupted state at `path` if this very request made it from these images."""
    import model

    try:
        found = model.read(path)
    except UserError:  # missing, cut short, or of another program: train anew
        return None
    return found if all(found.get(name) == value for name, value in facts.items()) else None


def train_size(settings: dict, images: dict, device, precision, batch_size: int, **paths) -> list:
    """train_network() with a batch size that fits into memory."""
    size = settings["image_size"]
    try:
        with datasets.readable_errors():
            return train_network(settings, images, device, precision, batch_size, **paths)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = max(batch_size // 2, 2)
        if smaller == batch_size or devices.process_count() > 1:  # the other processes wait for this one
            mend = f"try --batch-size {smaller}, or smaller --image-sizes"
            raise UserError(f"{size} px, batch size {batch_size}: out of memory; {mend}") from error
        print_rank0(f"{size} px: out of memory at batch size {batch_size}; going on with {smaller}")
        batch_size = smaller
    return train_size(settings, images, device, precision, batch_size, **paths)


def train_network(
    settings: dict, images: dict, device, precision, batch_size: int, data: Path, weights: Path, workers: int
) -> list:
    """Train one network or resume it, write its best epoch; a row for each.  UserError if it diverges."""
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    size, epochs = settings["image_size"], settings["epochs"]
    best_path, last = checkpoint_path(weights, size), checkpoint_path(weights, size, "last")
    processes = devices.process_count()
    batch_size = max(2, batch_size // processes)  # that of all processes stays the same
    share = dict(seed=settings["seed"], rank=rank(), world_size=processes, pin_memory=device.type == "cuda")
    train_loader, test_loader, classes = datasets.make_loaders(data, size, batch_size, workers, **share)
    training = Training(settings, images, classes, device, precision)
    training.resume(last)
    network = DistributedDataParallel(training.network) if processes > 1 else training.network
    kind = str(precision).removeprefix("torch.")
    made_by = dict(device=devices.hardware(device), precision=kind, processes=processes)
    made_by |= dict(train_images=images["train_images"], data=images["fingerprint"], sample=images["sample"])
    for epoch in range(len(training.history) + 1, epochs + 1):
        train_loader.sampler.set_epoch(epoch)
        label = f"{size} px, epoch {epoch}/{epochs}"
        bar = tqdm(train_loader, label, leave=False, unit="batch", disable=True if rank() else None)
        trained = training.train_one_epoch(network, bar, epoch)
        if not math.isfinite(trained["train_loss"]) or training.scaler.get_scale() < 1:
            mend = f"lower the rate: python train.py --learning-rate {settings['learning_rate'] / 4:.1g}"
            raise UserError(f"training at {size} px diverged; {mend}")
        devices.average_statistics(training.network)
        tested = evaluate(training.network, test_loader, device)
        training.note({"image_size": size, "epoch": epoch, **trained, **tested, **made_by})
        if rank() == 0:
            state = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
            training.save(last, **state, best=training.best)
        losses = f"training loss {trained['train_loss']:.3f}, test loss {tested['test_loss']:.3f}"
        accuracy = f"test accuracy {tested['test_accuracy']:.1%}, {trained['images_per_s']:.1f} images/s"
        print_rank0(f"{label}: {losses}, {accuracy}")  # only once it is saved
    best = training.best
    if rank() == 0:
        training.network.load_state_dict(best["model"])
        training.save(best_path, epoch=best["epoch"], accuracy=best["accuracy"])
        last.unlink(missing_ok=True)
    accuracy = f"test accuracy {best['accuracy']:.1%} of {images['test_images']} images"
    print_rank0(f"{size} px: best epoch {best['epoch']}, {accuracy} -> {best_path}")
    return training.history


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    pixels = number(int, 32, 4096)
    add("--image-sizes", type=pixels, nargs="+", help=f"pixels, square (default: {IMAGE_SIZES})")
    add("--epochs", type=number(int, 1, 10_000), help=f"per size (default: {EPOCHS})")
    images = number(int, 2, 65_536)  # batch norm needs two
    add("--batch-size", type=images, default=BATCH_SIZE, help="images per step, of all processes together")
    add("--learning-rate", type=number(float, 1e-9, 10.0), default=LEARNING_RATE, help="its peak")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    readers = number(int, 0, MOST_WORKERS)
    add("--workers", type=readers, default=4, help="processes that read images; 0: none but the training's")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--pretrained", action="store_true", help="start from ImageNet's weights (a download)")
    add("--force", action="store_true", help="train again what is already trained")
    add("--quick", action="store_true", help="try everything out: 64 px, 1 epoch, into <results>/quick")
    add_path_arguments(parser)
    args = parser.parse_args()
    args.image_sizes = args.image_sizes or ([64] if args.quick else IMAGE_SIZES)
    args.epochs = args.epochs or (1 if args.quick else EPOCHS)
    return args


def why_to_keep(path: Path, images: dict) -> str | None:
    """Why training on these images could not make the file at `path` again, if so."""
    import model

    if not path.exists():
        return None
    try:
        data = model.load_facts(path).get("data")
    except UserError:
        return "is not a checkpoint of train.py for this image size"
    same = isinstance(data, dict) and data.get("fingerprint") == images["fingerprint"]
    return None if same else "was trained on other images"


def keep_others(weights: Path, sizes: list[int], images: dict, force: bool) -> None:
    """What these images can't make again is not replaced: renamed with --force, else a UserError."""
    for size, which in itertools.product(sizes, ("best", "last")):
        path = checkpoint_path(weights, size, which)
        if (reason := why_to_keep(path, images)) and not force:
            mend = "to train all the same, and keep it beside the new one, add --force to the command"
            raise UserError(f"{path} {reason}; {mend}")
        if reason:
            print(f"what was {path} is kept as {rename_to_backup(path)}")


def main() -> None:
    args = arguments()
    device = devices.start_processes(args.device)
    results = args.results / "quick" if args.quick else args.results
    sizes = list(dict.fromkeys(args.image_sizes))
    if rank() == 0:
        from utils.report import training_log

        check_folder(args.weights, room_mb=len(sizes) * BEST_MB + 2 * LAST_MB)
        check_folder(results, room_mb=5)
        training_log.read_table(results / "training.csv")
        datasets.ensure_data(args.data, args.seed)
        datasets.check_images(args.data)
    devices.wait_for_all()
    images = datasets.describe(args.data)
    with file_lock(args.weights / ".train.lock", "training") if rank() == 0 else contextlib.nullcontext():
        if rank() == 0:
            remove_leftovers(args.weights, results)
            keep_others(args.weights, sizes, images, args.force)
        train_all(sizes, images, args, results, device)
    devices.end_processes()


def train_all(sizes: list[int], images: dict, args: argparse.Namespace, results: Path, device) -> None:
    """Train what is not trained yet, one size after another."""
    from utils.report import training_log

    precision = devices.choose_precision(device)
    counts = f"{images['train_images']} training and {images['test_images']} test images"
    sample = " (sample data)" if images["sample"] else ""
    kind = str(precision).removeprefix("torch.")
    print_rank0(f"{devices.hardware(device)}, {kind}, {counts}{sample}")
    classes = datasets.class_names(args.data)
    for size in sizes:
        settings = {"image_size": size} | {name: getattr(args, name) for name in REQUEST}
        path, facts = checkpoint_path(args.weights, size), dict(classes=classes, data=images)
        done = None if args.force else matching(path, settings=settings, **facts)
        devices.wait_for_all()
        if done:
            known = f"already trained, test accuracy {done['accuracy']:.1%}"
            print_rank0(f"{size} px: {known} (--force trains again)")
            rows = done["history"]
        else:
            how = dict(data=args.data, weights=args.weights, workers=args.workers)
            rows = train_size(settings, images, device, precision, args.batch_size, **how)
        if rank() == 0:
            training_log.write_results(results, rows)


if __name__ == "__main__":
    run_main(main)
