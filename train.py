"""Train one ResNet-18 per image size and keep the best epoch of each.

Reads data/ (drawn by datasets.py where there is none), writes weights/best_resnet18_<size>.pth,
results/training.csv and training.png.  A size that was trained with the same settings on the same images is
skipped; an interrupted one resumes after its last whole epoch.

    python train.py                                               all sizes, 5 epochs each
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
    read_json,
    remove_leftovers,
    rename_to_backup,
    run_main,
    write_json,
)

EPOCHS, BATCH_SIZE = 5, 8  # 8 learns from 18 sample heroes a class what 16 does from 24
LEARNING_RATE = 5e-4  # AdamW's peak; the best of 3e-4 to 4e-3, and better than SGD, on the sample heroes
WEIGHT_DECAY = 0.05
MOMENTUM = 0.2  # of batch norm's statistics; torch's 0.1 lags behind in so few steps (95, not 98 % right)
WARMUP = 0.2  # share of all steps in which the learning rate rises; then it falls to 0 along a cosine
REQUEST = ["epochs", "batch_size", "learning_rate", "seed", "pretrained"]  # what a checkpoint is made by
BEST_MB, LAST_MB = 45, 135  # a network; with the optimizer's state and the best epoch so far


def learning_rate_at(progress: float, peak: float) -> float:
    """The rate after this share (0..1) of all steps."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def train_one_epoch(network, batches, optimizer, scaler, precision, device, rate_at) -> dict[str, float]:
    """One pass over the training images; loss, accuracy and speed are of all processes together.

    `rate_at` gives the learning rate at a share (0..1) of this epoch.
    """
    import torch
    from torch.nn.functional import cross_entropy

    network.train()
    start = time.perf_counter()
    loss_sum, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    mixed = torch.autocast(device.type, precision) if precision != torch.float32 else contextlib.nullcontext()
    for step, (images, labels) in enumerate(batches):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, 3, S, S)
        labels = labels.to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = rate_at((step + 0.5) / len(batches))
        with mixed:
            logits = network(images)  # (N, classes)
            loss = cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss_sum += loss.detach() * len(labels)  # on the device: to read it each step makes the GPU wait
        correct += (logits.detach().argmax(1) == labels).sum()
        count += len(labels)
    # This waits for the device, so the clock stops when all is done.
    loss_sum, correct, count = devices.sum_over_ranks(loss_sum, correct, count, device=device)
    seconds = time.perf_counter() - start
    row = {"train_loss": loss_sum / count, "train_accuracy": correct / count}
    return row | {"seconds": seconds, "images_per_s": count / seconds}


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


def matching(path: Path, settings: dict, images: dict, classes: list[str]) -> dict | None:
    """The checkpoint or interrupted state at `path` if it was made by this very request from these images."""
    import model

    try:
        found = model.read(path)
    except UserError:  # missing, cut short, or of another program: train anew
        return None
    same = found.get("settings") == settings and found.get("data") == images
    return found if same and found["classes"] == classes else None


class Training:
    """The state of one network's training: saved after every epoch, read after an interruption."""

    def __init__(self, settings: dict, images: dict, classes: list[str], device, precision):
        import torch

        import model
        from utils.environment import torch_is_at_least

        torch.manual_seed(settings["seed"])
        network = model.build(len(classes), settings["pretrained"])
        options: dict = {"memory_format": torch.channels_last}
        self.network = network.to(device, **options)
        for module in self.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = MOMENTUM
        rate, fused = settings["learning_rate"], device.type == "cuda" or torch_is_at_least(2, 4)
        weights = self.network.parameters()
        self.optimizer = torch.optim.AdamW(weights, rate, weight_decay=WEIGHT_DECAY, fused=fused)
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        self.scaler = make_scaler(enabled=precision == torch.float16)
        self.settings, self.images = settings, images
        size = settings["image_size"]
        self.facts: dict = dict(classes=classes, image_size=size, settings=settings, data=images)
        self.history, self.best = [], {}

    def resume(self, path: Path) -> None:
        """Take over the state at `path` if it is of this very training."""
        state = matching(path, self.settings, self.images, self.facts["classes"])
        if state:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.history, self.best = state["history"], state["best"]
            print_rank0(f"{self.settings['image_size']} px: resuming after epoch {len(self.history)}")

    def has_diverged(self, loss: float) -> bool:
        return not math.isfinite(loss) or (self.scaler.is_enabled() and self.scaler.get_scale() < 1)

    def note(self, row: dict) -> None:
        """Add an epoch; keep its weights if it is the best so far."""
        data = {"data": self.images["fingerprint"], "sample": self.images["sample"]}
        self.history.append({**row, "train_images": self.images["train_images"], **data})
        epoch, accuracy, loss = row["epoch"], row["test_accuracy"], row["test_loss"]
        if not self.best or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            weights = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}
            self.best = {"epoch": epoch, "accuracy": accuracy, "loss": loss, "model": weights}

    def save(self, path: Path) -> None:
        """Write all that resume() needs."""
        import model

        state = {"best": self.best, "history": self.history, "optimizer": self.optimizer.state_dict()}
        model.save(path, self.network, **self.facts, **state, scaler=self.scaler.state_dict())

    def save_best(self, path: Path) -> None:
        """Write the network of the best epoch, and what is known of all epochs."""
        import model

        self.network.load_state_dict(self.best["model"])
        found = {name: self.best[name] for name in ("epoch", "accuracy")}
        model.save(path, self.network, **self.facts, **found, history=self.history)


def train_size(settings: dict, data: Path, weights: Path, images: dict, device, precision, **how) -> list:
    """train_network() with what this machine can do: FP32 where FP16 fails, a batch that fits into memory.

    `how`: workers, and the batch size if it is not the one that was asked for.
    """
    import torch

    size, batch_size = settings["image_size"], how.setdefault("batch_size", settings["batch_size"])
    try:
        with datasets.readable_errors():
            return train_network(settings, data, weights, images, device, precision, **how)
    except FloatingPointError:  # some GPUs of the GTX 16 series are known to compute NaN in FP16
        print_rank0(f"{size} px: FP16 gives no finite numbers on this GPU; starting this size again in FP32")
        devices.wait_for_all()
        checkpoint_path(weights, size, "last").unlink(missing_ok=True)
        precision = torch.float32
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        how["batch_size"] = max(batch_size // 2, 2)
        if how["batch_size"] == batch_size or devices.joined():  # the other processes wait for this one
            mend = f"try --batch-size {how['batch_size']}, or smaller --image-sizes"
            raise UserError(f"{size} px, batch size {batch_size}: out of memory; {mend}") from error
        smaller = how["batch_size"]
        print_rank0(f"{size} px: out of memory at batch size {batch_size}; going on with {smaller}")
    return train_size(settings, data, weights, images, device, precision, **how)


def train_network(
    settings: dict, data: Path, weights: Path, images: dict, device, precision, workers: int, batch_size: int
) -> list:
    """Train one network or resume it, write its best epoch; its rows.  UserError if it diverges."""
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    size, epochs, peak = settings["image_size"], settings["epochs"], settings["learning_rate"]
    best_path, last = checkpoint_path(weights, size), checkpoint_path(weights, size, "last")
    processes = devices.process_count()
    batch_size = max(2, batch_size // processes)  # that of all processes stays the same
    share = settings["seed"], rank(), processes, device.type == "cuda"
    train_loader, test_loader, classes = datasets.make_loaders(data, size, batch_size, workers, *share)
    state = Training(settings, images, classes, device, precision)
    if rank() == 0:
        keep(last, images)
    state.resume(last)
    network = DistributedDataParallel(state.network) if devices.joined() else state.network
    made_by = dict(device=devices.hardware(device), precision=devices.named(precision), processes=processes)
    for epoch in range(len(state.history) + 1, epochs + 1):
        train_loader.sampler.set_epoch(epoch)
        label = f"{size} px, epoch {epoch}/{epochs}"
        bar = tqdm(train_loader, label, leave=False, unit="batch", disable=True if rank() else None)

        def rate_at(share: float, done=epoch - 1) -> float:
            return learning_rate_at((done + share) / epochs, peak)

        trained = train_one_epoch(network, bar, state.optimizer, state.scaler, precision, device, rate_at)
        if state.has_diverged(trained["train_loss"]):
            if devices.named(precision) == "float16":
                raise FloatingPointError
            mend = f"lower the rate: python train.py --learning-rate {peak / 4:.1g}"
            raise UserError(f"training at {size} px diverged; {mend}")
        devices.average_statistics(state.network)
        tested = evaluate(state.network, test_loader, device)
        row = {"image_size": size, "epoch": epoch, **trained, **tested, **made_by}
        state.note(row)
        if rank() == 0:
            state.save(last)
        print_rank0(f"{label}: {described(row)}")  # only once it is saved
    if rank() == 0:
        keep(best_path, images)
        state.save_best(best_path)
        last.unlink(missing_ok=True)
    accuracy = f"test accuracy {state.best['accuracy']:.1%} of {images['test_images']} images"
    print_rank0(f"{size} px: best epoch {state.best['epoch']}, {accuracy} -> {best_path}")
    return state.history


def keep(path: Path, images: dict) -> None:
    """Rename what is at `path` if these images can't make it again."""
    import model

    if model.why_to_keep(path, images["fingerprint"]):
        print_rank0(f"what was {path} is kept as {rename_to_backup(path)}")


def described(row: dict) -> str:
    losses = f"training loss {row['train_loss']:.3f}, test loss {row['test_loss']:.3f}"
    return f"{losses}, test accuracy {row['test_accuracy']:.1%}, {row['images_per_s']:.1f} images/s"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    sizes: dict = dict(type=number(int, 32, 4096), help=f"pixels, square (default: {IMAGE_SIZES})")
    add("--image-sizes", nargs="+", **sizes)
    add("--epochs", type=number(int, 1, 10_000), help=f"per size (default: {EPOCHS})")
    batch: dict = dict(type=number(int, 2, 65_536), default=BATCH_SIZE)  # batch norm needs two images
    add("--batch-size", help="images per step, of all processes together", **batch)
    add("--learning-rate", type=number(float, 1e-9, 10.0), default=LEARNING_RATE, help="its peak")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    readers: dict = dict(type=number(int, 0, MOST_WORKERS), default=4)
    add("--workers", help="processes that read images; 0: none but the training's", **readers)
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--pretrained", help="start from ImageNet's weights (a download)", action="store_true")
    add("--force", help="train again what is already trained", action="store_true")
    add("--quick", help="try everything out: 64 px, 1 epoch, into <results>/quick", action="store_true")
    add_path_arguments(parser)
    args = parser.parse_args()
    args.image_sizes = args.image_sizes or ([64] if args.quick else IMAGE_SIZES)
    args.epochs = args.epochs or (1 if args.quick else EPOCHS)
    return args


def check_checkpoints(weights: Path, requests: list[dict], images: dict) -> None:
    """Raise UserError if training would replace what these images can't make again."""
    import model

    for settings in requests:
        size = settings["image_size"]
        for path in (checkpoint_path(weights, size), checkpoint_path(weights, size, "last")):
            if reason := model.why_to_keep(path, images["fingerprint"]):
                mend = "to train all the same, and keep it beside the new one, add --force to the command"
                raise UserError(f"{path} {reason}; {mend}")


def main() -> None:
    args = arguments()
    device = devices.start_processes(args.device)
    results = args.results / "quick" if args.quick else args.results
    common = {name: getattr(args, name) for name in REQUEST}
    requests = [{"image_size": size, **common} for size in dict.fromkeys(args.image_sizes)]
    if rank() == 0:
        from utils.report import training_log

        check_folder(args.weights, room_mb=len(requests) * BEST_MB + 2 * LAST_MB)
        check_folder(results, room_mb=5)
        training_log.read_table(results / "training.csv")
        datasets.ensure_data(args.data, args.seed)
        datasets.check_images(args.data)
    devices.wait_for_all()
    images = datasets.describe(args.data)
    if not args.force:
        check_checkpoints(args.weights, requests, images)
    with file_lock(args.weights / ".train.lock", "training") if rank() == 0 else contextlib.nullcontext():
        train_all(requests, images, args, results, device)
    devices.end_processes()


def train_all(requests: list[dict], images: dict, args: argparse.Namespace, results: Path, device) -> None:
    """Train what is not trained yet, one size after another."""
    from utils.report import training_log

    if rank() == 0:
        remove_leftovers(args.weights, results)
    precision = devices.choose_precision(device)
    counts = f"{images['train_images']} training and {images['test_images']} test images"
    sample = " (sample data)" if images["sample"] else ""
    print_rank0(f"{devices.hardware(device)}, {devices.named(precision)}, {counts}{sample}")
    classes = datasets.class_names(args.data)
    forced_path = args.weights / "forced.json"
    forced = []  # what --force has still to train: it, too, is resumed after an interruption
    if args.force:
        left = read_json(forced_path)
        left = [request for request in requests if request in left] if isinstance(left, list) else []
        forced = left or list(requests)
    for settings in requests:
        size, done = settings["image_size"], None
        if settings not in forced:
            done = matching(checkpoint_path(args.weights, size), settings, images, classes)
        devices.wait_for_all()
        if done:
            accuracy = f"test accuracy {done['accuracy']:.1%}"
            print_rank0(f"{size} px: already trained, {accuracy} (--force trains again)")
            rows = done["history"]
        else:
            paths = args.data, args.weights
            rows = train_size(settings, *paths, images, device, precision, workers=args.workers)
        if rank() == 0:
            training_log.write_results(results, rows)
            if settings in forced:
                forced.remove(settings)
                write_json(forced_path, forced) if forced else forced_path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main)
