"""Data sets: batches in pairs of one class or uniform, images in memory or streamed from the disk.

Everything random is a pure function: `epoch_plan` of (seed, epoch), the crop of a streamed image of
(seed, epoch, image). Resuming needs no generator's state; any number of workers gives equal bits.

InMemory  uint8 tensors on the device (CIFAR-100: 184 MB). A training batch is one gather, without
          worker processes or copies from the host.
Streamed  a folder too large for that. Workers decode, crop and flip uint8; the device normalises.

symbol  meaning                        default
n       images of a split              50,000 and 10,000 (CIFAR-100)
H, W    image size                     32, 32; ImageNet 224, 224
b       images of one batch            128 or 130 at batch_size 128 on CIFAR-100, about n / steps
pad     zero padding before the crop   image size // 8 = 4, in memory only
share   (rank, size)                   (0, 1): this process's share of each batch, under torchrun
"""

import hashlib
import os
import socket
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from support import seeds
from support.console import UserError, shorten
from support.images import ENDINGS, BatchOfImages, CentreView, RandomView, Reader, decode
from support.synthetic import MOST, synthetic

try:
    import fcntl
except ImportError:  # Windows: processes that start together may download at once
    fcntl = None

DATASETS = ("cifar100", "cifar10", "imagenet", "folder", "synthetic")
AUGMENTATIONS = ("crop-flip", "crop", "none")
# torchvision's class, mean, std of the training images as published
CIFAR = {
    "cifar100": (datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std
NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException)


@dataclass(kw_only=True)
class Dataset:
    """What both kinds share. A split is "train", "validation" or "test"."""

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
    digest: str = ""  # of the training set before its split: its name, or a hash of its file names
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each

    def __post_init__(self):
        self.mean_std = torch.tensor([self.mean, self.std], device=self.train_labels.device)

    def to(self, device):
        """The same data set with all its tensors on `device`: its batches come there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: x.to(device) for name, x in values.items() if torch.is_tensor(x)}
        return replace(self, **tensors)

    def steps_per_epoch(self, batch_size):
        """Batches of an epoch. Raises UserError for a batch size that this set cannot fill."""
        return count_steps(len(self.train_labels), batch_size)

    def facts(self):
        """What a checkpoint and a student file say of the data, by name."""
        names = ("classes", "mean", "std", "image_size", "resize", "digest")
        return {name: getattr(self, name) for name in names}

    def check_classes(self, classes, path, data_dir):
        """Raises UserError where the file at `path` was trained on other classes."""
        if list(classes) != list(self.classes):
            here = f"--dataset {self.name} --data-dir {data_dir} ({shorten(self.classes)})"
            raise UserError(f"{path} was trained on other classes ({shorten(classes)}) than those "
                            f"of {here}: give its own data set")


@dataclass(kw_only=True)
class InMemory(Dataset):
    """Images are NHWC: what is gathered is channels_last. A CUDA graph may take `take`'s place."""

    train_images: Tensor  # uint8 [n, H, W, 3]
    validation_images: Tensor  # uint8 [n_validation, H, W, 3]
    test_images: Tensor  # uint8 [n_test, H, W, 3]

    def __post_init__(self):
        super().__post_init__()
        self.pad = self.train_images.shape[1] // 8

    def take(self, index, top, left, flip):
        """A `Batch`'s columns -> augmented float32 [b, 3, H, W], labels int64 [b]; never waits."""
        if self.augmentation == "none":
            images = self.train_images[index]  # [b, H, W, 3]
        else:
            flip = flip if self.augmentation == "crop-flip" else torch.zeros_like(flip)
            images = augment(self.train_images, Batch(index, top, left, flip), self.pad)
        return normalise(images, *self.mean_std), self.train_labels[index]

    def train_batches(self, batch_size, seed, epoch, start=0, *, pairs=True, share=(0, 1)):
        """An epoch from step `start` on: images float32 [b, 3, H, W], labels, index int64 [b]."""
        plan = epoch_plan(self.train_labels, batch_size, self.pad, seed, epoch, pairs)
        for batch in plan[start:]:
            batch = cut(batch, share, pairs)
            yield *self.take(*batch), batch.index

    def test_batches(self, split="test", share=(0, 1)):
        """A split in order: images float32 [b, 3, H, W], labels int64 [b]; R shares: every R-th."""
        rank, size = share
        images = getattr(self, f"{split}_images")[rank::size]
        labels = getattr(self, f"{split}_labels")[rank::size]
        for some, y in zip(images.split(500), labels.split(500), strict=True):
            yield normalise(some, *self.mean_std), y


@dataclass(kw_only=True)
class Streamed(Dataset):
    """Images are read when they are needed, by `workers` processes (0: by this one)."""

    data_dir: str
    train_files: np.ndarray  # bytes [n], below data_dir; workers would copy Python strings
    validation_files: np.ndarray  # bytes [n_validation]
    test_files: np.ndarray  # bytes [n_test]
    workers: int
    readers: dict = field(init=False, default_factory=dict)  # of the splits read so far

    def train_batches(self, batch_size, seed, epoch, start=0, *, pairs=True, share=(0, 1)):
        """As InMemory's: images [b, 3, H, W], labels [b], index [b]. Raises ImageError."""
        plan = epoch_plan(self.train_labels.cpu(), batch_size, 0, seed, epoch, pairs)
        indices = [cut(batch, share, pairs).index for batch in plan[start:]]
        images_of_batches = self._read("train", indices, f"{seed},{epoch}")
        for images, index in zip(images_of_batches, indices, strict=True):
            index = index.to(images.device, non_blocking=True)
            yield images, self.train_labels[index], index

    def test_batches(self, split="test", share=(0, 1)):
        """As InMemory's, of the centre, the shorter side at `resize`. Raises ImageError."""
        rank, size = share
        labels = getattr(self, f"{split}_labels")
        indices = torch.arange(len(labels))[rank::size].split(100)
        yield from zip(self._read(split, indices), labels[rank::size].split(100), strict=True)

    def _read(self, split, indices, key=None):
        """The images of each batch, float32 [b, 3, H, W] normalised on the device."""
        device = self.train_labels.device
        if split not in self.readers:
            view = CentreView(self.resize, self.image_size)
            if split == "train" and self.augmentation != "none":
                view = RandomView(self.image_size, self.augmentation == "crop-flip")
            files = getattr(self, f"{split}_files")
            read = BatchOfImages(self.data_dir, files, view, self.image_size)
            self.readers[split] = Reader(read, self.workers, pin_memory=device.type == "cuda")
        for images in self.readers[split]([(index.numpy(), key) for index in indices]):
            yield normalise(images.to(device, non_blocking=True), *self.mean_std)


def load(name, data_dir="data", image_size=None, *, stream=False, validation_fraction=0.0, seed=0,
         augment="crop-flip", workers=0, synthetic_images=None):
    """Data set `name`, one of DATASETS, on the CPU. Raises UserError for what the user can mend.

    cifar100, cifar10  downloaded into data_dir by torchvision, unless there already
    imagenet           data_dir/train/CLASS/* and data_dir/val/CLASS/*, streamed, 224 pixels
    folder             data_dir/train/CLASS/* and data_dir/test/CLASS/* (or val), what Pillow reads
    synthetic          20 classes of drawn shapes, 10,000 + 2,000 images; no network, no disk.
                       synthetic_images: only the first so many of the 10,000

    image_size: 32 by default, imagenet 224. stream: a folder is read while training.
    validation_fraction: the share of each class's training images held out, a function of seed.
    """
    for option, value, known in (("dataset", name, DATASETS), ("augment", augment, AUGMENTATIONS)):
        if value not in known:
            raise UserError(f'--{option} {value}: unknown, choose from {", ".join(known)}')
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction} must be at least 0 and "
                        "less than 1")
    count = synthetic_images or MOST
    if count > MOST or synthetic_images and name != "synthetic":
        raise UserError(f"--synthetic-images {count} goes with --dataset synthetic, up to {MOST}")
    data_dir = Path(os.path.expanduser(data_dir))  # Path's own raises for an unknown ~user
    size = image_size or (224 if name == "imagenet" else 32)
    stream = stream or name == "imagenet"
    resize = round(size * 256 / 224) if stream else size
    shared = dict(name=name, image_size=size, resize=resize, augmentation=augment)
    split = lambda labels, classes: validation_split(labels, classes, validation_fraction, seed)
    if name in ("imagenet", "folder"):
        return load_folder(data_dir, split, stream, workers, shared)
    if stream:
        raise UserError(f"--dataset {name} is small enough for memory: leave --stream out")
    if name in CIFAR and size != 32:
        raise UserError(f"--dataset {name} has images of 32 pixels, not {size}: "
                        "use --dataset folder")
    loaded = load_cifar(name, data_dir) if name in CIFAR else synthetic(size, count)
    classes, images, labels, test_images, test_labels = loaded
    kept, held = split(labels, classes)
    mean, std = CIFAR[name][1:] if name in CIFAR else mean_std(images[kept])
    return InMemory(classes=classes, mean=mean, std=std, digest=name,
                    train_images=images[kept], train_labels=labels[kept],
                    validation_images=images[held], validation_labels=labels[held],
                    test_images=test_images, test_labels=test_labels, **shared)


def validation_split(labels, classes, fraction, seed):
    """What indexes the images that stay for training and those held out, each in order.

    Of a class's m images round(fraction * m) are held out, from 1 to m - 1, drawn from `seed`.
    Raises UserError for a class of one image.
    """
    if fraction == 0:
        return slice(None), slice(0)
    counts = labels.bincount(minlength=len(classes))  # [classes]
    if (counts < 2).any():
        few = ", ".join(classes[c] for c in (counts < 2).nonzero().flatten())
        raise UserError(f"--validation-fraction {fraction}: one image alone cannot be split, "
                        f"class {few}")
    held = (counts.double() * fraction).round().long().clamp(min=1).minimum(counts - 1)  # [classes]
    order = by_class(labels, seeds.generator(f"validation,{seed}"))  # [n]
    starts = counts.cumsum(0) - counts  # [classes], places in `order`
    rank = torch.arange(len(labels)) - starts[labels[order]]  # [n], place within the class
    first = rank < held[labels[order]]
    return order[~first].sort().values, order[first].sort().values


def load_cifar(name, data_dir):
    """Classes, then images and labels of both splits; torchvision compares MD5 sums first."""
    cifar = CIFAR[name][0]
    archive = data_dir / cifar.filename
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds a connection or read: without a network fail soon
    try:
        with redirect_stdout(sys.stderr), one_at_a_time(data_dir):  # stdout is the training log's
            train, test = (cifar(data_dir, train=split, download=True) for split in (True, False))
    except NETWORK_ERRORS as error:
        damaged = f" and the {archive} found there is damaged (wrong MD5)"
        damaged = damaged if os.path.exists(archive) else ""
        raise UserError(
            f"--dataset {name}: cannot download {cifar.url} ({error}){damaged}; either fetch that "
            f"file yourself and put it at {archive}, or use --dataset folder --data-dir DIR "
            "(DIR/train/CLASS/*, DIR/test/CLASS/*), or --dataset synthetic") from error
    except OSError as error:  # not a folder, read-only, disk full, no permission
        raise UserError(f"--data-dir {data_dir}: cannot hold {name} ({error}); choose another "
                        "folder, one that can be written to, with 400 MB free") from error
    except RuntimeError as error:  # torchvision's word for a wrong MD5
        raise UserError(f"--dataset {name}: {archive}, or what was unpacked from it, is damaged "
                        "(wrong MD5); delete both and run again") from error
    finally:
        socket.setdefaulttimeout(timeout)
    both = (train, test)
    images, test_images = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in both)
    labels, test_labels = (torch.tensor(split.targets) for split in both)
    return list(train.classes), images, labels, test_images, test_labels


@contextmanager
def one_at_a_time(folder):
    """Processes wait here for each other, or all but the first would read half a download."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written, or a file system without locks
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".download.lock", "a"))
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def load_folder(data_dir, split, stream, workers, shared):
    """An InMemory, 50,000 images of 32 pixels 0.15 GB, of 224 pixels 7.5 GB; or a Streamed."""
    train, *tests = (data_dir / name for name in ("train", "test", "val"))
    tests = tests[::-1] if shared["name"] == "imagenet" else tests  # its test folder has no labels
    test = next(filter(os.path.isdir, tests), None)  # Path.is_dir raises where access is denied
    for folder in (data_dir, train):
        if not os.path.isdir(folder):
            raise UserError(f"--data-dir {data_dir}: no folder {folder} that can be read; "
                            f"expected {data_dir}/train/CLASS/* and {data_dir}/test/CLASS/* "
                            "(or val)")
    classes, files, labels, notes = scan(data_dir, train)
    kept, held = split(labels, classes)
    if test:
        test_classes, test_files, test_labels, more = scan(data_dir, test)
        notes += more
        if classes != test_classes:
            ours, theirs = set(classes), set(test_classes)
            alone = {train: ours - theirs, test: theirs - ours}
            parts = [f"only in {d}: {', '.join(sorted(some))}" for d, some in alone.items() if some]
            raise UserError(f"--data-dir {data_dir}: the classes differ, {'; '.join(parts)}")
    elif len(labels[held]):
        test_files, test_labels = files[held], labels[held]
        notes += [f"no folder {data_dir}/test or val: the validation images are the test set too"]
    else:
        raise UserError(f"--data-dir {data_dir}: no folder {data_dir}/test or val that can be "
                        "read; --validation-fraction 0.1 would split the training images")
    digest = hashlib.sha256(files.tobytes()).hexdigest()[:16]
    shared.update(classes=classes, notes=notes, digest=digest, train_labels=labels[kept],
                  validation_labels=labels[held], test_labels=test_labels)
    if stream:
        mean, std = IMAGENET
        return Streamed(data_dir=str(data_dir), workers=workers, mean=mean, std=std,
                        train_files=files[kept], validation_files=files[held],
                        test_files=test_files, **shared)
    decoded = lambda some: decode(data_dir, some, shared["image_size"])
    images, validation_images = decoded(files[kept]), decoded(files[held])
    test_images = decoded(test_files) if test else validation_images
    mean, std = mean_std(images)
    return InMemory(train_images=images, validation_images=validation_images,
                    test_images=test_images, mean=mean, std=std, **shared)


def scan(data_dir, folder):
    """Class names, files (bytes [n], paths below data_dir), labels int64 [n], notes.

    The order is ImageFolder's. A class may be a link to a folder. Links to folders inside a class
    are skipped, like files that are no images by their names. Raises UserError.
    """
    files, skipped = [], []
    below = len(os.path.join(data_dir, ""))
    try:
        with os.scandir(folder) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        skipped += [entry.path for entry in entries if not entry.is_dir()]
        for name in classes:
            start = os.path.join(data_dir, folder.name, name)  # as in `below`: Path(".") drops "./"
            paths = sorted(find_images(start, skipped), key=os.path.split)
            files.append(np.array([os.fsencode(path[below:]) for path in paths], "S"))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error}") from error
    if not classes:
        raise UserError(f"{folder} has no class folders; expected {folder}/CLASS/*")
    if len(classes) < 2:
        raise UserError(f"{folder} has one class only ({classes[0]}); at least two are needed")
    empty = [name for name, some in zip(classes, files, strict=True) if not len(some)]
    if empty:
        raise UserError(f"{folder}: no image that can be read in class {', '.join(empty)}; "
                        f"looked for .jpg, .png, .webp and {len(ENDINGS) - 3} other endings that "
                        "Pillow knows")
    some = ", ".join(sorted(skipped)[:3]) + ", ..." * (len(skipped) > 3)
    notes = [f"{folder}: {len(skipped)} files or links skipped, not images of a class: {some}"]
    counts = torch.tensor([len(some) for some in files])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return classes, np.concatenate(files), labels, notes if skipped else []


def find_images(folder, skipped):
    """Paths of the images in `folder` and below, hidden ones left out; `skipped` gets the rest."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from find_images(entry.path, skipped)
            elif entry.is_dir() or os.path.splitext(entry.name)[1].lower() not in ENDINGS:
                skipped.append(entry.path)
            elif entry.is_file():
                yield entry.path
            else:  # opening a FIFO would wait for ever
                raise UserError(f"{entry.path} is no file (a FIFO, a socket, a broken link): "
                                "remove it")


def mean_std(images):
    """Mean and standard deviation of each channel of uint8 [n, H, W, 3], in units of [0, 1]."""
    total, squares = torch.zeros(2, 3, dtype=torch.int64)  # exact
    for chunk in images.split(1000):
        pixels = chunk.flatten(0, 2).long()  # [1000 * H * W, 3]
        total += pixels.sum(0)
        squares += (pixels * pixels).sum(0)
    count = images[..., 0].numel()
    mean = total.double() / count  # [3]
    std = (squares.double() / count - mean * mean).clamp(min=1).sqrt()  # never 0: it will divide
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Which images make a batch, and how each is cropped and flipped."""

    index: Tensor  # int64 [b], into the n images; images 2i, 2i + 1 are a pair, an odd one is last
    top: Tensor  # int64 [b], corner of the crop in the padded image, 0 .. 2 * pad
    left: Tensor  # int64 [b]
    flip: Tensor  # bool [b]


def count_steps(n, batch_size):
    """n // batch_size. Raises UserError unless batch_size is even and 2 <= batch_size <= n."""
    if batch_size % 2 or not 2 <= batch_size <= n:
        raise UserError(f"batch size {batch_size} must be even, at least 2 and at most the {n} "
                        f"training images: {n // 2 * 2} is the largest that fits")
    return n // batch_size


def by_class(labels, generator):
    """All images [n], grouped by class, random within."""
    order = torch.randperm(len(labels), generator=generator)
    return order[labels[order].argsort(stable=True)]


def epoch_plan(labels, batch_size, pad, seed, epoch, pairs=True):
    """The n // batch_size batches of an epoch, on the device of `labels` (int64 [n], all >= 0).

    Every image comes exactly once, in pairs of one class (`deal_pairs`) or uniformly. No image is
    dropped: batches differ by one pair (CIFAR-100 at 128: 350 of 128 and 40 of 130 images), or by
    one image. A pure function of its arguments. Raises UserError as `count_steps` does.
    """
    n = len(labels)
    steps, generator = count_steps(n, batch_size), seeds.generator(f"{seed},{epoch}")
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


def deal_pairs(labels, steps, generator):
    """All images [n] in pairs of one class, one batch after the other, and the batches' sizes.

    The contrastive losses need a positive for each anchor. Class c, of m_c pairs, has at most
    ceil(m_c / steps) of them in a batch: with enough classes, all pairs of a batch differ in class.
    The last images of odd classes join in mixed pairs; of an odd n one stays alone.
    """
    # Pairs: each class in random order, cut in twos; what is left over joins.
    n = len(labels)
    order = by_class(labels, generator)  # [n]
    counts = labels.bincount()  # [classes]
    last = counts.cumsum(0) - 1  # [classes], place of each class's last image
    is_single = torch.zeros(n, dtype=torch.bool)
    is_single[last[counts % 2 == 1]] = True
    single = order[is_single]
    single = single[torch.randperm(len(single), generator=generator)]
    if n % 2:
        single = torch.cat([single, torch.tensor([-1])])  # a blank beside the lone image
    pairs = torch.cat([order[~is_single], single]).view(-1, 2)  # [ceil(n / 2), 2]

    # Their batches. Groups: the pairs of each class, then the mixed ones, then the lone image.
    sizes = [*(counts // 2).tolist(), len(single) // 2 - n % 2, n % 2]
    batch_of = [None] * len(sizes)
    load = torch.zeros(steps, dtype=torch.float64)  # pairs of each batch, less those that all have
    classes = torch.randperm(len(counts), generator=generator).tolist()
    for group in [*classes, len(counts), len(counts) + 1]:
        every, rest = divmod(sizes[group], steps)  # every batch gets `every`, `rest` get one more
        emptiest = (load + torch.rand(steps, generator=generator)).argsort()  # ties at random
        load[emptiest[:rest]] += 1
        batch_of[group] = torch.cat([torch.arange(steps).repeat(every), emptiest[:rest]])
    batch_of = torch.cat(batch_of)  # [ceil(n / 2)]

    # One batch after the other, each in random order, the lone image at the end of its own.
    place = 0.9 * torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    if n % 2:
        place[-1] = 0.95
    by_batch = (batch_of + place).argsort()
    index = pairs[by_batch].flatten()
    is_image = index >= 0  # all but the blank
    sizes = batch_of[by_batch].repeat_interleave(2)[is_image].bincount()
    return index[is_image], sizes.tolist()


def cut(batch, share, pairs):
    """One process's part of a batch: b = B // size images, in pairs 2 (B // 2 // size);
    the rest is left out.

    batch: Batch of columns [B]; share: (rank, size);
    pairs: images 2i and 2i + 1 stay together, so that each process contrasts whole pairs.
    -> Batch of columns [b], views.
    """
    rank, size = share
    if size == 1:
        return batch
    each = len(batch.index) // 2 // size * 2 if pairs else len(batch.index) // size
    mine = slice(rank * each, (rank + 1) * each)
    return Batch(*(column[mine] for column in batch))


def augment(images, batch, pad):
    """uint8 [n, H, W, 3], padded by zeros, cropped to its size and flipped -> uint8 [b, H, W, 3].

    One gather: the host does not wait, and shapes depend on b alone.
    """
    height, width = images.shape[1:3]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    x = torch.where(batch.flip[:, None], width - 1 - x, x)  # [b, W]
    y = (y + batch.top[:, None] - pad)[:, :, None]  # [b, H, 1], rows of the unpadded image
    x = (x + batch.left[:, None] - pad)[:, None, :]  # [b, 1, W]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # [b, H, W]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    crops = images[batch.index[:, None, None], y, x]  # [b, H, W, 3]
    return crops * inside[..., None]


def normalise(images, mean, std):
    """(images / 255 - mean) / std: uint8 [B, H, W, 3] to float32 [B, 3, H, W]; mean and std [3]."""
    images = images.permute(0, 3, 1, 2)  # [B, 3, H, W], a view: channels_last
    return (images - 255 * mean.view(3, 1, 1)) / (255 * std.view(3, 1, 1))
