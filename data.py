"""Data sets: batches in pairs of one class or uniform, images in memory or streamed from the disk.

Everything random is a pure function: `epoch_plan` of (seed, epoch), the crop of a streamed image of (seed, epoch,
image). Resuming at any step needs no state of any random generator, and any number of workers gives the same bits.

InMemory  a whole data set as uint8 tensors on the device (CIFAR-100: 184 MB). A training batch is one gather: no
          worker processes, no copies from the host.
Streamed  a folder too large for that. Workers decode, crop and flip on uint8; the device normalises.

symbol  meaning                        default
n       images of a split              50,000 and 10,000 (CIFAR-100)
H, W    image size                     32, 32; ImageNet 224, 224
b       images of one batch            128 or 130 at batch_size 128 on CIFAR-100, about n / steps
pad     zero padding before the crop   image size // 8 = 4, in memory only
part    (rank, size)                   (0, 1): this process's part of each batch, under torchrun
"""

import functools
import hashlib
import os
import random
import signal
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPException
from math import exp, log, sqrt, tau
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

try:
    import fcntl
except ImportError:  # Windows: processes that start together may download at once
    fcntl = None

try:
    from torchvision.io import decode_jpeg
except ImportError:  # deprecated since torchvision 0.29
    decode_jpeg = None

DATASETS = ("cifar100", "cifar10", "imagenet", "folder", "synthetic")
AUGMENTATIONS = ("crop-flip", "crop", "none")
CIFAR = {  # torchvision's class, mean, std of the training images as published
    "cifar100": (datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std
NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException)
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("shaded", "striped", "checked", "dotted")

Image.init()  # Pillow's formats, less those that it only identifies or hands to another program
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
ENDINGS = {e for e, form in Image.registered_extensions().items() if form in Image.OPEN and form not in NO_IMAGES}
warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data", UserWarning)  # common in ImageNet, harmless


class DataError(ValueError):
    """A problem with a data set that the user can mend; the message is one line that says where and how."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


# ---------------------------------------------------------------- the two kinds of data set

@dataclass(kw_only=True)
class Dataset:
    """What both kinds share. A split is "train", "validation" or "test"; the device is that of the labels."""

    name: str
    classes: list[str]
    mean: tuple[float, float, float]  # per channel, in units of [0, 1]
    std: tuple[float, float, float]
    image_size: int  # pixels, H and W of a batch
    resize: int  # pixels, the shorter side before the centre crop at evaluation
    augmentation: str  # one of AUGMENTATIONS
    train_labels: Tensor  # int64 [n]
    validation_labels: Tensor  # int64 [n_validation], empty without a validation split
    test_labels: Tensor  # int64 [n_test]
    digest: str = ""  # tells one training set, before its split, from another: the data set's name, or of all file names
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each

    def __post_init__(self):
        self.mean_std = torch.tensor([self.mean, self.std], device=self.train_labels.device)  # [2, 3]

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with all its tensors on `device`: its batches come there."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of an epoch. Raises DataError for a batch size that this training set cannot fill."""
        return count_steps(len(self.train_labels), batch_size)


@dataclass(kw_only=True)
class InMemory(Dataset):
    """Images are NHWC, so that whatever is gathered from them is channels_last already.

    `draw` may be replaced by a recording of it, a CUDA graph: it is a function of tensors alone and never waits.
    """

    train_images: Tensor  # uint8 [n, H, W, 3]
    validation_images: Tensor  # uint8 [n_validation, H, W, 3]
    test_images: Tensor  # uint8 [n_test, H, W, 3]

    def __post_init__(self):
        super().__post_init__()
        self.pad = self.train_images.shape[1] // 8

    def draw(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of a `Batch` to its augmented images float32 [b, 3, H, W] and labels int64 [b]."""
        if self.augmentation == "none":
            images = self.train_images[index]  # [b, H, W, 3]
        else:
            flip = flip if self.augmentation == "crop-flip" else torch.zeros_like(flip)
            images = augment(self.train_images, Batch(index, top, left, flip), self.pad)  # [b, H, W, 3]
        return normalise(images, *self.mean_std), self.train_labels[index]

    def train_batches(self, batch_size: int, seed: int, epoch: int, start: int = 0, *, pairs: bool = True,
                      part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images float32 [b, 3, H, W], labels int64 [b] and index int64 [b] of one epoch, from step `start` on."""
        for batch in epoch_plan(self.train_labels, batch_size, self.pad, seed, epoch, pairs)[start:]:
            batch = cut(batch, part, pairs)
            yield *self.draw(*batch), batch.index

    def test_batches(self, split: str = "test", part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, float32 [b, 3, H, W], and labels int64 [b]; of R parts every R-th image."""
        rank, size = part
        columns = (getattr(self, f"{split}_{name}")[rank::size].split(500) for name in ("images", "labels"))
        for images, labels in zip(*columns, strict=True):
            yield normalise(images, *self.mean_std), labels


@dataclass(kw_only=True)
class Streamed(Dataset):
    """Images are read when they are needed, by `workers` processes (0: by this one).

    File names are numpy bytes: each worker would copy a million Python strings, page by page, by counting references.
    """

    data_dir: str
    train_files: np.ndarray  # bytes [n], paths below data_dir
    validation_files: np.ndarray  # bytes [n_validation]
    test_files: np.ndarray  # bytes [n_test]
    workers: int

    def train_batches(self, batch_size: int, seed: int, epoch: int, start: int = 0, *, pairs: bool = True,
                      part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As InMemory's: images float32 [b, 3, H, W], labels int64 [b], index int64 [b]. Raises DataError."""
        plan = epoch_plan(self.train_labels.cpu(), batch_size, 0, seed, epoch, pairs)[start:]
        indices = [cut(batch, part, pairs).index for batch in plan]
        draw = functools.partial(random_view, f"{seed},{epoch}", self.image_size, self.augmentation == "crop-flip")
        reading = self._read(self.train_files, indices, None if self.augmentation == "none" else draw)
        for images, index in zip(reading, indices, strict=True):
            index = index.to(images.device, non_blocking=True)
            yield images, self.train_labels[index], index

    def test_batches(self, split: str = "test", part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """As InMemory's, the shorter side resized to `resize`, the centre cropped. Raises DataError."""
        rank, size = part
        files, labels = getattr(self, f"{split}_files"), getattr(self, f"{split}_labels")
        indices = torch.arange(len(files))[rank::size].split(100)
        yield from zip(self._read(files, indices), labels[rank::size].split(100), strict=True)

    def _read(self, files: np.ndarray, indices: list[Tensor], view: Callable | None = None) -> Iterator[Tensor]:
        """The images of each batch, float32 [b, 3, H, W] normalised on the device; view: else the evaluation's."""
        device = self.train_labels.device
        view = view or functools.partial(centre_view, self.resize, self.image_size)
        load = functools.partial(read_views, self.data_dir, files, view, self.image_size)
        for images in read_items(load, [index.numpy() for index in indices], self.workers, device.type == "cuda"):
            yield normalise(images.to(device, non_blocking=True), *self.mean_std)


# ---------------------------------------------------------------- loading

def load(name: str, data_dir: str | Path = "data", image_size: int | None = None, *, stream: bool = False,
         validation_fraction: float = 0.0, seed: int = 0, augment: str = "crop-flip",
         workers: int = 0) -> InMemory | Streamed:
    """Data set `name`, one of DATASETS, on the CPU. Raises DataError for anything the user can mend.

    cifar100, cifar10  downloaded into data_dir by torchvision, unless there already
    imagenet           data_dir/train/CLASS/* and data_dir/val/CLASS/*, streamed, 224 pixels
    folder             data_dir/train/CLASS/* and data_dir/test/CLASS/* (or val for test), any images Pillow reads
    synthetic          20 classes of drawn shapes, 10,000 + 2,000 images; needs neither network nor disk

    image_size: 32 by default, imagenet 224. stream: a folder is read while training. validation_fraction: the share
    of each class's training images that becomes the validation split, a function of seed.
    """
    if name not in DATASETS:
        raise DataError(f'--dataset {name}: unknown, choose from {", ".join(DATASETS)}')
    if not 0 <= validation_fraction < 1:
        raise DataError(f"--validation-fraction {validation_fraction} must be at least 0 and less than 1")
    if augment not in AUGMENTATIONS:
        raise DataError(f'--augment {augment}: unknown, choose from {", ".join(AUGMENTATIONS)}')
    data_dir = Path(os.path.expanduser(data_dir))  # Path's own raises for an unknown ~user
    size = image_size or (224 if name == "imagenet" else 32)
    stream = stream or name == "imagenet"
    split = functools.partial(validation_split, fraction=validation_fraction, seed=seed)
    shared = dict(name=name, image_size=size, resize=round(size * 256 / 224) if stream else size, augmentation=augment)
    if name in ("imagenet", "folder"):
        return _load_folder(data_dir, split, stream, workers, shared)
    if stream:
        raise DataError(f"--dataset {name} is small enough for memory: leave --stream out")
    if name in CIFAR and size != 32:
        raise DataError(f"--dataset {name} has images of 32 pixels, not {size}: use --dataset folder")
    loaded = _load_cifar(name, data_dir) if name in CIFAR else _draw_synthetic(size)
    classes, images, labels, test_images, test_labels = loaded
    kept, held = split(labels, classes)
    mean, std = CIFAR[name][1:] if name in CIFAR else _mean_std(images[kept])
    return InMemory(classes=classes, mean=mean, std=std, train_images=images[kept], train_labels=labels[kept],
                    validation_images=images[held], validation_labels=labels[held],
                    test_images=test_images, test_labels=test_labels, digest=name, **shared)


def validation_split(labels: Tensor, classes: list[str], fraction: float, seed: int) -> tuple:
    """What indexes the images that stay for training and those held out, each in order.

    Of a class of m images round(fraction * m) are held out, at least 1 and at most m - 1, drawn from `seed`.
    """
    if fraction == 0:
        return slice(None), slice(0)
    counts = labels.bincount(minlength=len(classes))  # [classes]
    if (counts < 2).any():
        few = ", ".join(classes[c] for c in (counts < 2).nonzero().flatten())
        raise DataError(f"--validation-fraction {fraction}: one image alone cannot be split, class {few}")
    held = (counts.double() * fraction).round().long().clamp(min=1).minimum(counts - 1)  # [classes]
    order = by_class(labels, random_generator(f"validation,{seed}"))  # [n]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # [n], place within the class
    first = rank < held[labels[order]]
    return order[~first].sort().values, order[first].sort().values


# ---------------------------------------------------------------- CIFAR

def _load_cifar(name: str, data_dir: Path) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """Classes, then images and labels of both splits. torchvision compares MD5 sums before it unpacks or unpickles."""
    cifar = CIFAR[name][0]
    archive = data_dir / cifar.filename
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds for each connection and read: without a network fail soon
    try:
        with redirect_stdout(sys.stderr), one_at_a_time(data_dir):  # stdout belongs to the training log
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
    images, test_images = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test))
    return list(train.classes), images, torch.tensor(train.targets), test_images, torch.tensor(test.targets)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes wait here for each other, or all but the first would read a file that is half downloaded."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written, or a file system without locks
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a"))
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- a folder of images

def _load_folder(data_dir: Path, split: Callable, stream: bool, workers: int, shared: dict) -> InMemory | Streamed:
    """In memory each split is one uint8 tensor: 0.15 GB for 50,000 images of 32 pixels, 7.5 GB of 224."""
    train, *tests = (data_dir / name for name in ("train", "test", "val"))
    tests = tests[::-1] if shared["name"] == "imagenet" else tests  # ImageNet's test folder has no labels
    test = next(filter(os.path.isdir, tests), None)  # Path.is_dir raises where a parent folder denies access
    for folder in (data_dir, train):
        if not os.path.isdir(folder):
            raise DataError(f"--data-dir {data_dir}: no folder {folder} that can be read; "
                            f"expected {data_dir}/train/CLASS/* and {data_dir}/test/CLASS/* (or val)")
    classes, files, labels, notes = _scan(data_dir, train)
    kept, held = split(labels, classes)
    if test:
        test_classes, test_files, test_labels, more = _scan(data_dir, test)
        notes += more
        if classes != test_classes:
            parts = [f'only in {folder}: {", ".join(sorted(names))}' for folder, names in
                     ((train, set(classes) - set(test_classes)), (test, set(test_classes) - set(classes))) if names]
            raise DataError(f'--data-dir {data_dir}: the classes differ, {"; ".join(parts)}')
    elif len(labels[held]):
        test_files, test_labels = files[held], labels[held]
        notes.append(f"no folder {data_dir}/test or val: the validation images are the test set too")
    else:
        raise DataError(f"--data-dir {data_dir}: no folder {data_dir}/test or val that can be read; "
                        "--validation-fraction 0.1 would split the training images")
    shared.update(classes=classes, notes=notes, train_labels=labels[kept], validation_labels=labels[held],
                  test_labels=test_labels, digest=hashlib.sha256(files.tobytes()).hexdigest()[:16])
    if stream:
        return Streamed(data_dir=str(data_dir), train_files=files[kept], validation_files=files[held],
                        test_files=test_files, workers=workers, mean=IMAGENET[0], std=IMAGENET[1], **shared)
    images, validation_images = (_decode(data_dir, some, shared["image_size"]) for some in (files[kept], files[held]))
    test_images = _decode(data_dir, test_files, shared["image_size"]) if test else validation_images
    mean, std = _mean_std(images)
    return InMemory(train_images=images, validation_images=validation_images, test_images=test_images,
                    mean=mean, std=std, **shared)


def _scan(data_dir: Path, folder: Path) -> tuple[list[str], np.ndarray, Tensor, list[str]]:
    """Class names, files (bytes [n], paths below data_dir), labels int64 [n], notes; sorted as ImageFolder does."""
    files, notes, skipped = [], [], []
    below = len(os.path.join(data_dir, ""))
    try:
        with os.scandir(folder) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        skipped += [entry.path for entry in entries if not entry.is_dir()]
        for name in classes:
            start = os.path.join(data_dir, folder.name, name)  # as `below` counts: Path(".") / name drops the "./"
            walk = sorted(_walk(start, (os.path.realpath(folder),), notes, skipped))
            paths = [os.fsencode(f"{parent[below:]}/{file}") for parent, some in walk for file in some]
            files.append(np.array(paths, "S"))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error}") from error
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/*")
    if len(classes) < 2:
        raise DataError(f"{folder} has one class only ({classes[0]}); at least two are needed")
    empty = [name for name, some in zip(classes, files, strict=True) if not len(some)]
    if empty:
        raise DataError(f'{folder}: no image that can be read in class {", ".join(empty)}; '
                        f'looked for .jpg, .png, .webp and {len(ENDINGS) - 3} other endings that Pillow knows')
    if skipped:
        notes.append(f'{folder}: {len(skipped)} files skipped, not images of a class by their names: '
                     f'{", ".join(sorted(skipped)[:3])}{", ..." * (len(skipped) > 3)}')
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(some) for some in files]))
    return classes, np.concatenate(files), labels, notes


def _walk(folder: str, above: tuple[str, ...], notes: list, skipped: list) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its images) for `folder` and all below it, hidden ones left out. Links to folders are followed.

    above: the true paths of the folders on the way here; a link to one of them, or above one, leads back.
    """
    here = os.path.realpath(folder)
    if any(os.path.commonpath([here, parent]) == here for parent in above):
        notes.append(f"{folder} is a link that leads back to {here}: not followed")
        return
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, here), notes, skipped)
            elif os.path.splitext(entry.name)[1].lower() not in ENDINGS:
                skipped.append(entry.path)
            elif entry.is_file():
                names.append(entry.name)
            else:  # opening a FIFO would wait for ever
                raise DataError(f"{entry.path} is no file (a FIFO, a socket, a broken link): remove it")
    yield folder, sorted(names)


def _decode(data_dir: Path, files: np.ndarray, size: int) -> Tensor:
    """Images as uint8 [n, size, size, 3], decoded by threads straight into their place."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def decode(i: int) -> None:
        path = os.path.join(data_dir, os.fsdecode(files[i]))
        with naming(path), Image.open(path) as image:  # of an animation the first frame
            image = _rgb(image)
            if image.size != (size, size):  # shorter side to `size`, the middle of the longer one
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            images[i] = np.asarray(image)

    pool = ThreadPoolExecutor()
    try:
        list(pool.map(decode, range(len(files))))
    finally:  # Ctrl-C and errors wait for the images in hand only
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def _rgb(image: Image.Image) -> Image.Image:
    """Upright and RGB: 16-bit gray is scaled, where Pillow would clip it; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
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


# ---------------------------------------------------------------- streaming

def read_items(load: Callable, batches: list, workers: int, pin_memory: bool = False) -> Iterator:
    """load(batch) of each batch in order, by `workers` processes (0: by this one). Raises DataError, as load may."""
    loader = DataLoader(batches, batch_size=None, collate_fn=functools.partial(attempt, load), num_workers=workers,
                        pin_memory=pin_memory, worker_init_fn=leave_group, generator=torch.Generator())  # its own
    child = getattr(signal, "SIGCHLD", None)  # Windows has none, nor process groups
    handler = child and signal.getsignal(child)
    try:
        items = iter(loader)
        with suppress(ValueError, TypeError):  # outside the main thread no handler is set, without SIGCHLD none is there
            signal.signal(child, handler)  # torch's would raise in the middle of a step; next() does too
        for item in items:
            if isinstance(item, DataError):
                raise item
            yield item
    except Exception as error:
        if workers:
            error.with_traceback(None)  # its frames, DataLoader's, would keep the workers; the message has load's
        if "DataLoader worker (pid" not in str(error):
            raise  # an error in load
        raise DataError(f"a process that reads images has ended ({error}): try fewer --workers") from error
    finally:
        items = None  # ends the workers now, though a traceback may keep this frame


def attempt(load: Callable, batch):
    """load(batch), or its DataError as a value: DataLoader would wrap a traceback around it."""
    try:
        return load(batch)
    except DataError as error:
        return error


def leave_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM go to the program's process group, which needs its workers for its last step."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # SIGTERM must end a worker: the program's exit waits for that


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Decoders raise many kinds for a broken file: each becomes a DataError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"cannot read image {path} ({error}); mend or remove it") from error


def read_views(data_dir: str, files: np.ndarray, view: Callable, size: int, batch: np.ndarray) -> Tensor:
    """uint8 [b, size, size, 3]: views of the files numbered in `batch`. view: (uint8 [3, h, w], number) -> a view."""
    images = torch.empty(len(batch), size, size, 3, dtype=torch.uint8)
    for place, i in enumerate(batch):
        with naming(path := os.path.join(data_dir, os.fsdecode(files[i]))):
            images[place] = view(read_image(path), i).permute(1, 2, 0)
    return images


def read_image(path: str) -> Tensor:
    """uint8 [3, h, w]. An RGB JPEG that lies upright goes through torchvision, if that still decodes: it is
    faster than Pillow, which reads everything else."""
    with Image.open(path) as image:  # reads the header only
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if decode_jpeg and upright and image.format == "JPEG" and image.mode == "RGB":
            with suppress(RuntimeError):  # Pillow may read what this refuses
                return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
        return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)  # [3, h, w], channels_last in memory


def pictures(paths: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, uint8 [3, h, w]) of the files named and of all images in the folders named. Raises DataError."""
    for path in paths:
        within = sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()
                        and not p.name.startswith("."))
        if os.path.isdir(path) and not within:
            raise DataError(f"no image in {path}")
        for name in within or [path]:
            with naming(name):
                image = read_image(name)
            yield name, image


def random_view(seed: str, size: int, may_flip: bool, image: Tensor, number: int) -> Tensor:
    """RandomResizedCrop and flip of uint8 [3, h, w] to [3, size, size], a function of (seed, number) alone."""
    generator = random.Random(f"{seed},{number}")  # hashes its text: neighbours are unrelated
    flip = generator.random() < 0.5
    image = F.resized_crop(image, *crop_box(*image.shape[1:], generator), [size, size], antialias=True)
    return F.horizontal_flip(image) if flip and may_flip else image


def crop_box(height: int, width: int, generator: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of RandomResizedCrop: 8 to 100% of the area, width / height between 3/4 and 4/3."""
    for _ in range(10):
        area, ratio = height * width * generator.uniform(0.08, 1), exp(generator.uniform(-1, 1) * log(4 / 3))
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.random() * (height - h + 1)), int(generator.random() * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # none fits: the middle
    return (height - h) // 2, (width - w) // 2, h, w


def centre_view(resize: int, size: int, image: Tensor, number: int) -> Tensor:
    """The evaluation's view: shorter side to `resize`, the middle [3, size, size]."""
    return F.center_crop(F.resize(image, [resize], antialias=True), [size, size])


# ---------------------------------------------------------------- drawn images

def _draw_synthetic(size: int) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """The 20 classes are SHAPES x TEXTURES; every draw comes from a generator of its own with a fixed seed."""
    generator = torch.Generator().manual_seed(20)
    classes = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    labels, test_labels = (torch.arange(count) % len(classes) for count in (10_000, 2_000))
    images, test_images = (torch.cat([_draw(chunk, size, generator) for chunk in some.split(500)])
                           for some in (labels, test_labels))
    return classes, images, labels, test_images, test_labels


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

    index: Tensor  # int64 [b], into the n images; in pairs: images 2i and 2i + 1 are a pair (an odd one is last)
    top: Tensor  # int64 [b], corner of the crop in the padded image, 0 .. 2 * pad
    left: Tensor  # int64 [b]
    flip: Tensor  # bool [b]


def count_steps(n: int, batch_size: int) -> int:
    """n // batch_size. Raises DataError unless batch_size is even and 2 <= batch_size <= n."""
    if batch_size % 2 or not 2 <= batch_size <= n:
        raise DataError(f"batch size {batch_size} must be even, at least 2 and at most the {n} training images: "
                        f"{n // 2 * 2} is the largest that fits")
    return n // batch_size


def random_generator(key: str) -> torch.Generator:
    """Seeded by 32 bits of SHA-256 of `key`, which is what torch's CPU generator uses: neighbours are unrelated."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))


def by_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """All images [n], grouped by class, random within."""
    order = torch.randperm(len(labels), generator=generator)
    return order[labels[order].argsort(stable=True)]


def epoch_plan(labels: Tensor, batch_size: int, pad: int, seed: int, epoch: int, pairs: bool = True) -> list[Batch]:
    """The n // batch_size batches of an epoch, tensors on the device of `labels` (int64 [n], all >= 0).

    Every image comes exactly once, in pairs of one class (`deal_pairs`) or uniformly. No image is dropped to make n
    divisible: batches differ by one pair instead, CIFAR-100 at 128 giving 350 of 128 and 40 of 130 images, or by one
    image. A pure function of its arguments. Raises DataError as `count_steps` does.
    """
    n = len(labels)
    steps, generator = count_steps(n, batch_size), random_generator(f"{seed},{epoch}")
    device, labels = labels.device, labels.cpu()
    if pairs:
        index, sizes = deal_pairs(labels, steps, generator)
    else:
        index = torch.randperm(n, generator=generator)
        sizes = (torch.arange(steps + 1) * n // steps).diff().tolist()
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = (column.to(device).split(sizes) for column in (index, top, left, flip))
    return [Batch(*row) for row in zip(*columns, strict=True)]


def deal_pairs(labels: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """All images [n] in pairs of one class, one batch after the other, and the batches' sizes.

    The contrastive losses need a positive for each anchor. Class c, of m_c pairs, has at most ceil(m_c / steps) of
    them in a batch: with enough classes, all pairs of a batch differ in class. The last images of odd classes join in
    mixed pairs; of an odd n one stays alone.
    """
    n = len(labels)
    # Pairs: group by class in random order, cut each group in twos, join what is left over.
    order = by_class(labels, generator)  # [n]
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
    return index[index >= 0], sizes


def cut(batch: Batch, part: tuple[int, int], pairs: bool) -> Batch:
    """Part `rank` of `size` equal ones, pairs whole. What does not divide is left out, others in the next epoch."""
    rank, size = part
    if size == 1:
        return batch
    each = len(batch.index) // 2 // size * 2 if pairs else len(batch.index) // size
    return Batch(*(column[rank * each:(rank + 1) * each] for column in batch))


def augment(images: Tensor, batch: Batch, pad: int) -> Tensor:
    """Images of a split uint8 [n, H, W, 3], padded by zeros, cropped to their size and flipped: uint8 [b, H, W, 3].

    One gather; no host sync, and shapes depend on b alone.
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
    """(images / 255 - mean) / std, mean and std float32 [3]: uint8 [B, H, W, 3] to float32 [B, 3, H, W]."""
    images = images.permute(0, 3, 1, 2)  # [B, 3, H, W], a view: channels_last
    return (images - 255 * mean.view(3, 1, 1)) / (255 * std.view(3, 1, 1))
