"""Data sets as uint8 tensors, class-balanced batches, and augmentation on the device.

A whole data set lives in memory, on the GPU if there is one (CIFAR-100: 184 MB), so that a training batch is one
gather: no worker processes, no copies from the host, and nothing random outside `epoch_plan`, which is a pure
function of (seed, epoch). Resuming at any step therefore needs no state of any random generator.

symbol  meaning                        default
n       images of a split              50,000 and 10,000 (CIFAR-100)
H, W    image size                     32, 32
b       images of one batch            128 or 130 at batch_size 128 on CIFAR-100, about n / steps
pad     zero padding before the crop   image size // 8 = 4
"""

import hashlib
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from http.client import HTTPException
from math import tau
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

DATASETS = ("cifar100", "cifar10", "folder", "synthetic")
CIFAR = {  # torchvision's class, mean, std of the training images as published
    "cifar100": (datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException)
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("shaded", "striped", "checked", "dotted")


class DataError(Exception):
    """A problem with a data set that the user can mend; the message is one line that says where and how."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Dataset(NamedTuple):
    """A data set in memory. Images are NHWC, so that whatever is gathered from them is channels_last already."""

    name: str
    train_images: Tensor  # uint8 [n, H, W, 3]
    train_labels: Tensor  # int64 [n]
    test_images: Tensor  # uint8 [n_test, H, W, 3]
    test_labels: Tensor  # int64 [n_test]
    classes: list[str]
    mean: tuple[float, float, float]  # of the training images, per channel, in units of [0, 1]
    std: tuple[float, float, float]

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its four tensors on `device`."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return self._replace(**{name: getattr(self, name).to(device) for name in tensors})


def load(name: str, data_dir: str | Path = "data", image_size: int = 32) -> Dataset:
    """Data set `name`, one of DATASETS, on the CPU. Raises DataError for anything the user can mend.

    cifar100, cifar10  downloaded into data_dir by torchvision, unless there already
    folder             data_dir/train/CLASS/* and data_dir/test/CLASS/* (or val for test), any images Pillow reads
    synthetic          20 classes of drawn shapes, 10,000 + 2,000 images; needs neither network nor disk
    """
    data_dir = Path(data_dir).expanduser()
    if name in CIFAR:
        if image_size != 32:
            raise DataError(f"--dataset {name} has images of 32 pixels, not {image_size}: use --dataset folder")
        return _load_cifar(name, data_dir)
    if name == "folder":
        return _load_folder(data_dir, image_size)
    if name == "synthetic":
        return _draw_synthetic(image_size)
    raise DataError(f'--dataset {name}: unknown, choose from {", ".join(DATASETS)}')


# ---------------------------------------------------------------- CIFAR

def _load_cifar(name: str, data_dir: Path) -> Dataset:
    """torchvision compares MD5 sums of the archive before unpacking and of every file before unpickling it."""
    cifar, mean, std = CIFAR[name]
    archive = data_dir / cifar.filename
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds for each connection and read: without a network fail soon
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to the training log
            train, test = (cifar(data_dir, train=split, download=True) for split in (True, False))
    except NETWORK_ERRORS as error:
        damaged = f" and the {archive} found there is damaged (wrong MD5)" if os.path.exists(archive) else ""
        raise DataError(f"--dataset {name}: cannot download {cifar.url} ({error}){damaged}; either fetch that file "
                        f"yourself and put it at {archive}, or use --dataset folder --data-dir DIR (DIR/train/CLASS/*, "
                        "DIR/test/CLASS/*), or --dataset synthetic") from error
    except OSError as error:  # not a folder, read-only, disk full, no permission
        raise DataError(f"--data-dir {data_dir}: cannot hold {name} ({error}); choose another folder, one that can "
                        "be written to, with 400 MB free") from error
    except RuntimeError as error:  # torchvision's word for a wrong MD5
        raise DataError(f"--dataset {name}: {archive}, or what was unpacked from it, is damaged (wrong MD5); "
                        "delete both and run again") from error
    finally:
        socket.setdefaulttimeout(timeout)
    tensors = []
    for split in (train, test):
        tensors += [torch.from_numpy(np.ascontiguousarray(split.data)), torch.tensor(split.targets)]
    return Dataset(name, *tensors, list(train.classes), mean, std)


# ---------------------------------------------------------------- a folder of images

def _load_folder(data_dir: Path, size: int) -> Dataset:
    """Decoded into one uint8 tensor a split: 0.15 GB for 50,000 images of 32 pixels, 7.5 GB of 224."""
    train, test = data_dir / "train", data_dir / "test"
    if not os.path.isdir(test):  # Path.is_dir raises where a parent folder denies access
        test = data_dir / "val"
    for folder, title in ((data_dir, data_dir), (train, train), (test, f"{data_dir}/test or val")):
        if not os.path.isdir(folder):
            raise DataError(f"--data-dir {data_dir}: no folder {title} that can be read; "
                            f"expected {data_dir}/train/CLASS/* and {data_dir}/test/CLASS/* (or val)")
    classes, train_files = _scan(train)
    test_classes, test_files = _scan(test)
    if classes != test_classes:
        parts = [f'only in {folder}: {", ".join(sorted(names))}' for folder, names in
                 ((train, set(classes) - set(test_classes)), (test, set(test_classes) - set(classes))) if names]
        raise DataError(f'--data-dir {data_dir}: the classes differ, {"; ".join(parts)}')
    images, test_images = _decode(train_files, size), _decode(test_files, size)
    labels, test_labels = (torch.tensor([c for _, c in files]) for files in (train_files, test_files))
    return Dataset("folder", images, labels, test_images, test_labels, classes, *_mean_std(images))


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (file, class) pairs, found and sorted as torchvision's ImageFolder does."""
    try:
        classes, number = find_classes(folder)
        files = make_dataset(folder, number, IMG_EXTENSIONS, allow_empty=True)
    except FileNotFoundError:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/*") from None
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error}") from error
    if len(classes) < 2:
        raise DataError(f"{folder} has one class only ({classes[0]}); at least two are needed")
    empty = sorted(set(classes) - {classes[c] for _, c in files})
    if empty:
        raise DataError(f'{folder}: no image that can be read in class {", ".join(empty)}; '
                        f'looked for {" ".join(IMG_EXTENSIONS)}')
    return classes, files


def _decode(files: list[tuple[str, int]], size: int) -> Tensor:
    """Images as uint8 [n, size, size, 3], decoded by threads straight into their place."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def decode(i: int) -> None:
        path = files[i][0]
        try:
            with Image.open(path) as image:  # of an animation the first frame
                image = _rgb(ImageOps.exif_transpose(image))
                if image.size != (size, size):  # shorter side to `size`, the middle of the longer one
                    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
                images[i] = np.asarray(image)
        except Exception as error:  # Pillow raises many kinds for broken files
            raise DataError(f"cannot read image {path} ({error}); mend or remove it") from error

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(files))):
            pass
    return torch.from_numpy(images)


def _rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit gray is scaled, where Pillow would clip it; transparent parts become white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [n, H, W, 3], from exact integer sums in small chunks."""
    total, squares = torch.zeros(2, 3, dtype=torch.int64)
    for chunk in images.split(1000):
        pixels = chunk.flatten(0, 2).long()  # [1000 * H * W, 3]
        total += pixels.sum(0)
        squares += (pixels * pixels).sum(0)
    count = images[..., 0].numel()
    mean = total.double() / count  # [3]
    std = (squares.double() / count - mean * mean).clamp(min=1).sqrt()  # a constant channel must not divide by 0
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# ---------------------------------------------------------------- drawn images

def _draw_synthetic(size: int) -> Dataset:
    """The 20 classes are SHAPES x TEXTURES; every draw comes from a generator of its own with a fixed seed."""
    generator = torch.Generator().manual_seed(20)
    classes = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    train_labels, test_labels = (torch.arange(count) % len(classes) for count in (10_000, 2_000))
    train_images, test_images = (torch.cat([_draw(chunk, size, generator) for chunk in labels.split(500)])
                                 for labels in (train_labels, test_labels))
    return Dataset("synthetic", train_images, train_labels, test_images, test_labels, classes, *_mean_std(train_images))


def _draw(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """One image for each label, uint8 [b, size, size, 3]: a textured shape of two colours on a third, noise over all.

    Place, scale and two rotations are drawn anew for each image. The five shapes have the same area, and every colour
    is spread evenly about mid-gray, so that the classes do not differ in their mean colour.
    """
    b = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *(shape or (1, 1)), generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = axis - uniform(-0.2, 0.2), axis[:, None] - uniform(-0.2, 0.2)  # [b, 1, size], [b, size, 1]

    # The shape, in its own frame: its signed distance, negative inside; each shape has area 2.
    angle, radius = uniform(0, tau), uniform(0.55, 0.8)
    u = (x * angle.cos() + y * angle.sin()) / radius  # [b, size, size]
    v = (y * angle.cos() - x * angle.sin()) / radius
    r, s, t = torch.hypot(u, v), u.abs(), v.abs()
    distances = torch.stack([  # in the order of SHAPES
        r - 0.798,
        torch.maximum(s, t) - 0.707,
        torch.maximum(-v, 0.866 * s + 0.5 * v) - 0.620,
        (r - 0.75).abs() - 0.212,
        torch.minimum(torch.maximum(s - 0.98, t - 0.3), torch.maximum(t - 0.98, s - 0.3)),
    ])  # [5, b, size, size]
    distance = distances[labels // len(TEXTURES), torch.arange(b)]  # [b, size, size]
    inside = (0.5 - distance * radius * size / 2).clamp(0, 1)  # edges one pixel wide

    # The texture, in a frame of its own: the share of the first colour.
    angle, wave = uniform(0, tau), uniform(14, 18)
    p = wave * (x * angle.cos() + y * angle.sin()) + uniform(0, tau)  # phase, [b, size, size]
    q = wave * (y * angle.cos() - x * angle.sin()) + uniform(0, tau)
    shares = torch.stack([0.5 + 0.5 * u, 0.5 + 2 * p.sin(), 0.5 + 4 * p.sin() * q.sin(), 2 * (p.sin() + q.sin()) - 1])
    share = shares.clamp(0, 1)[labels % len(TEXTURES), torch.arange(b)]  # in the order of TEXTURES, [b, size, size]

    # A mid-gray ground between two colours that differ from it in each channel, one darker, one lighter: with grounds
    # far from the data set's mean, batch norm's running statistics lag behind and test accuracy jumps about.
    side = torch.where(uniform(0, 1, 3, 1, 1) < 0.5, -1, 1)  # [b, 3, 1, 1]
    first, second = (0.5 + sign * side * uniform(0.15, 0.5, 3, 1, 1) for sign in (1, -1))
    ground = uniform(0.35, 0.65, 3, 1, 1)
    share, inside = share[:, None], inside[:, None]  # [b, 1, size, size]
    image = inside * (share * first + (1 - share) * second) + (1 - inside) * ground  # [b, 3, size, size]
    image += 0.05 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()  # [b, size, size, 3]


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Which images make a batch, and how each is cropped and flipped."""

    index: Tensor  # int64 [b], into the n images; images 2i and 2i + 1 are a pair (an odd one is last)
    top: Tensor  # int64 [b], corner of the crop in the padded image, 0 .. 2 * pad
    left: Tensor  # int64 [b]
    flip: Tensor  # bool [b]


def epoch_plan(labels: Tensor, batch_size: int, pad: int, seed: int, epoch: int) -> list[Batch]:
    """The n // batch_size batches of an epoch, tensors on the device of `labels` (int64 [n], all >= 0).

    Every image comes exactly once, in pairs of one class, since the contrastive losses need a
    positive for each anchor. Class c, of m_c pairs, has at most ceil(m_c / steps) of them in a batch: with enough
    classes, all pairs of a batch differ in class. The last images of odd classes join in mixed pairs; of an odd n one
    stays alone. No image is dropped to make n divisible: batches differ by one pair instead, CIFAR-100 at 128
    giving 350 of 128 and 40 of 130 images.

    A pure function of its arguments: the generator's seed is SHA-256 of "seed,epoch". (torch's CPU generator uses the
    low 32 bits: neighbouring seeds and epochs are unrelated, a chance collision harms nothing.)
    Raises ValueError unless batch_size is even and 2 <= batch_size <= n.
    """
    n = len(labels)
    if batch_size % 2 or not 2 <= batch_size <= n:
        raise ValueError(f"batch size {batch_size} must be even, at least 2 and at most the {n} training images")
    steps = n // batch_size
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    device, labels = labels.device, labels.cpu()

    # Pairs: group by class in random order, cut each group in twos, join what is left over.
    order = torch.randperm(n, generator=generator)
    order = order[labels[order].argsort(stable=True)]  # [n], grouped by class, random within
    counts = labels.bincount()  # [classes]
    last = counts.cumsum(0) - 1  # [classes], place of each class's last image
    odd = torch.zeros(n, dtype=torch.bool)
    odd[last[counts % 2 == 1]] = True
    single = order[odd]
    single = single[torch.randperm(len(single), generator=generator)]
    if n % 2:
        single = torch.cat([single, torch.tensor([-1])])  # a blank beside the image that stays alone
    pairs = torch.cat([order[~odd], single]).view(-1, 2)  # [ceil(n / 2), 2]

    # Deal: of each group the same number to every batch, the remainder to the batches that have least so far.
    groups = (counts // 2).tolist()  # pairs of each class, then (dealt last) mixed pairs and the lone image
    groups += [len(single) // 2 - n % 2, n % 2]
    starts = np.cumsum([0] + groups)
    batch_of = torch.empty(len(pairs), dtype=torch.int64)
    load = torch.zeros(steps, dtype=torch.float64)  # pairs of each batch, less those that all have
    classes = torch.randperm(len(counts), generator=generator).tolist()
    for group in classes + [len(counts), len(counts) + 1]:
        every, rest = divmod(groups[group], steps)
        least = (load + torch.rand(steps, generator=generator)).argsort()[:rest]  # ties at random: no batch is special
        load[least] += 1
        batch_of[starts[group]:starts[group + 1]] = torch.cat([torch.arange(steps).repeat(every), least])

    place = 0.9 * torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    if n % 2:
        place[-1] = 0.95  # the image that stays alone comes last in its batch
    by_batch = (batch_of + place).argsort()
    index = pairs[by_batch].flatten()
    sizes = batch_of[by_batch].repeat_interleave(2)[index >= 0].bincount().tolist()
    index = index[index >= 0]  # [n]
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = (column.to(device).split(sizes) for column in (index, top, left, flip))
    return [Batch(*row) for row in zip(*columns)]


def augment(images: Tensor, batch: Batch, pad: int) -> Tensor:
    """The batch's images, zero-padded by `pad`, cropped to their size and flipped: uint8 [b, H, W, 3].

    images is the whole split, uint8 [n, H, W, 3]. One gather; no host sync, and shapes depend on b alone.
    """
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device) + batch.top[:, None] - pad  # [b, H], rows of the unpadded image
    x = torch.arange(width, device=images.device)
    x = torch.where(batch.flip[:, None], width - 1 - x, x) + batch.left[:, None] - pad  # [b, W]
    y, x = y[:, :, None], x[:, None, :]  # [b, H, 1], [b, 1, W]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # [b, H, W]
    crops = images[batch.index[:, None, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]  # [b, H, W, 3]
    return crops * inside[..., None]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std: uint8 [B, H, W, 3] to float32 [B, 3, H, W], channels_last in memory.

    mean, std: float32 [3] in units of [0, 1], on the images' device.
    """
    images = images.permute(0, 3, 1, 2)  # [B, 3, H, W], a view: channels_last
    return (images - 255 * mean.view(3, 1, 1)) / (255 * std.view(3, 1, 1))


def drawing(data: Dataset) -> Callable:
    """The function from the four tensors of a `Batch` to its augmented images float32 [b, 3, H, W] and labels int64 [b]."""
    mean, std = torch.tensor([data.mean, data.std], device=data.train_images.device)

    def draw(*batch: Tensor) -> tuple[Tensor, Tensor]:
        batch = Batch(*batch)
        return normalise(augment(data.train_images, batch, _pad(data)), mean, std), data.train_labels[batch.index]

    return draw


def train_batches(data: Dataset, batch_size: int, seed: int, epoch: int, start: int = 0,
                  draw: Callable | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images float32 [b, 3, H, W] and labels int64 [b] of one epoch, from step `start` on.

    draw: what `drawing(data)` returned, if it is at hand, or a recording of it.
    """
    draw = draw or drawing(data)
    for batch in epoch_plan(data.train_labels, batch_size, _pad(data), seed, epoch)[start:]:
        yield draw(*batch)


def _pad(data: Dataset) -> int:
    return data.train_images.shape[1] // 8


def test_batches(data: Dataset, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, float32 [b, 3, H, W], and their labels int64 [b]."""
    mean, std = torch.tensor([data.mean, data.std], device=data.test_images.device)
    for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size)):
        yield normalise(images, mean, std), labels
