"""What predict.py is held against on a GPU: many different photos, and a bare DALI loop that labels them.

`make` writes JPEGs of 500 x 375 px and about 110 KB, each another crop of a photo in --sources (those that
scikit-image and scikit-learn bring along do).  `bare` classifies a folder with one DALI pipeline and a
network that waits for each batch: what `python predict.py photos/` should come close to, in the same minute.
Both run in a folder with weights/ (python train.py --image-sizes 224).

    python tests/bench_photos.py make photos/ --sources FOLDER --count 46000
    python tests/bench_photos.py bare photos/ --backend onnx-nhwc-graph
"""

import argparse
import io
import multiprocessing
import random
import sys
import time
from pathlib import Path

from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WIDTH, HEIGHT = 500, 375
BYTES = 110_000
BATCH, SIZE = 256, 224


def crop(source: Path, rng: random.Random) -> Image.Image:
    """Part of a photo, turned over, brighter or darker by chance, and a little noisy."""
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    width = rng.uniform(0.55, 0.95) * min(image.width, image.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = left, top, left + width, top + height
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
    noise = Image.effect_noise((WIDTH, HEIGHT), 14).convert("RGB")
    return Image.blend(image, noise, 0.12)


def quality_of(source: Path) -> int:
    """The JPEG quality at which a crop of this photo has about BYTES."""
    image = crop(source, random.Random(source.name))
    for quality in range(80, 98):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() >= BYTES:
            return quality
    return 98


def write(task: tuple[Path, Path, int, int]) -> int:
    path, source, number, quality = task
    crop(source, random.Random(number)).save(path, quality=quality)
    return path.stat().st_size


def make(folder: Path, sources: Path, count: int) -> None:
    photos = sorted(path for path in sources.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    quality, tasks = {source: quality_of(source) for source in photos}, []
    for number in range(count):
        source = photos[number % len(photos)]
        path = folder / f"{number // 2000:02d}" / f"photo {number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        tasks.append((path, source, number, quality[source]))
    with multiprocessing.Pool() as pool:
        sizes = pool.map(write, tasks, chunksize=100)
    print(f"{count:,} photos, on average {sum(sizes) / count / 1000:.0f} KB")


def bare(folder: Path, name: str) -> None:
    """Print images/s of a loop that decodes with DALI, classifies, waits, and writes nothing."""
    import torch
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    import backends
    from utils.backend import inference
    from utils.environment import cores
    from utils.serve import choices, dali
    from utils.serve.pipeline import Network
    from utils.utils import checkpoint_path

    files = choices.find_images(folder)[0]

    @pipeline_def(batch_size=BATCH, num_threads=cores(), device_id=0, prefetch_queue_depth=dali.PREFETCH)
    def pipeline():
        data, _ = fn.readers.file(files=files, dont_use_mmap=True)
        how = {"device": "mixed", "output_type": types.RGB, "hw_decoder_load": dali.HARDWARE}
        images = fn.decoders.image(data, jpeg_fancy_upsampling=True, **how)
        return fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)

    with inference("cuda"):
        backend = backends.make(name)
        backend.load(checkpoint_path(Path("weights"), SIZE), SIZE, [BATCH], "cuda")
        network, decoder = Network(backend, [BATCH], SIZE, "cuda"), pipeline()
        decoder.build()
        pixels = torch.empty(BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device="cuda")
        warm_up, batches, start = 4, len(files) // BATCH, 0.0
        for number in range(batches):
            if number == warm_up:
                start = time.perf_counter()
            feed_ndarray(decoder.run()[0].as_tensor(), pixels, cuda_stream=torch.cuda.current_stream())
            network.finish(network.enqueue(pixels))
        rate = (batches - warm_up) * BATCH / (time.perf_counter() - start)
    print(f"{name}: {rate:,.0f} images/s after {warm_up} batches")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["make", "bare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=Path, help="folder of photos to make others of")
    parser.add_argument("--count", type=int, default=46_000)
    parser.add_argument("--backend", default="pytorch-fp16-graph")
    args = parser.parse_args()
    if args.what == "make" and not args.sources:
        parser.error("make needs --sources FOLDER")
    make(args.folder, args.sources, args.count) if args.what == "make" else bare(args.folder, args.backend)


if __name__ == "__main__":
    main()
