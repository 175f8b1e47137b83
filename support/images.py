"""Images of a user's: decoding, RGB, views, and reading by worker processes."""

import contextlib
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from support import seeds
from support.console import ImageError, UserError

try:
    from torchvision.io import decode_jpeg
except ImportError:  # deprecated since torchvision 0.29
    decode_jpeg = None

# Pillow's formats, less those that it only identifies or hands to another program
Image.init()
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
ENDINGS = {ending for ending, form in Image.registered_extensions().items()
           if form in Image.OPEN and form not in NO_IMAGES}
# common in ImageNet, harmless
warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data", UserWarning)
# --workers is the user's choice
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)


@contextlib.contextmanager
def naming(path):
    """Decoders raise many kinds for a broken file: each becomes an ImageError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"cannot read image {path} ({error}); mend or remove it") from error


def to_rgb(image):
    """Any Pillow image to RGB: upright, 16-bit gray scaled, which Pillow clips, no transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def read_image(path):
    """uint8 [3, h, w]; an upright RGB JPEG by torchvision, it is faster. Raises: see `naming`."""
    with Image.open(path) as image:  # reads the header only
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if decode_jpeg and upright and image.format == "JPEG" and image.mode == "RGB":
            with contextlib.suppress(RuntimeError):  # Pillow may read what this refuses
                return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
        pixels = torch.from_numpy(np.array(to_rgb(image)))  # [h, w, 3]
        return pixels.permute(2, 0, 1)


def decode(data_dir, files, size):
    """uint8 [n, size, size, 3]. files: bytes [n], paths below data_dir. Raises ImageError."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def decode_one(i):
        path = os.path.join(data_dir, os.fsdecode(files[i]))
        with naming(path), Image.open(path) as image:  # of an animation the first frame
            images[i] = np.asarray(fit(to_rgb(image), size))

    pool = ThreadPoolExecutor()
    try:
        list(pool.map(decode_one, range(len(files))))
    finally:  # Ctrl-C and errors wait for the images in hand only
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def fit(image, size):
    """A Pillow image with its shorter side at `size`, the middle of the longer one."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def pictures(paths):
    """(name, uint8 [3, h, w]) of the files, and of all images in the folders. Raises UserError."""
    for path in paths:
        if os.path.isdir(path):
            images = [p for p in Path(path).rglob("*") if p.suffix.lower() in ENDINGS]
            names = sorted(str(p) for p in images if not p.name.startswith(".") and p.is_file())
            if not names:
                raise UserError(f"no image in {path}")
        else:
            names = [path]
        for name in names:
            with naming(name):
                image = read_image(name)
            yield name, image


class RandomView:
    """RandomResizedCrop and flip of uint8 [3, h, w], a function of (key, number) alone."""

    def __init__(self, key, size, flip):
        self.key = key
        steps = [v2.RandomResizedCrop(size, antialias=True)]
        self.transform = v2.Compose(steps + [v2.RandomHorizontalFlip()] * flip)

    def __call__(self, image, number):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.seed(f"{self.key},{number}"))
            return self.transform(image)


class CentreView:
    """uint8 [3, h, w] at evaluation: the shorter side to `resize`, the middle [3, size, size]."""

    def __init__(self, resize, size):
        self.transform = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])

    def __call__(self, image, number=None):
        return self.transform(image)


class ImageBatches(Dataset):
    """Item i is the batch of images with the numbers batches[i], uint8 [b, size, size, 3].

    files: bytes [n], paths below data_dir. view: uint8 [3, h, w], number -> uint8 [3, size, size].
    """

    def __init__(self, data_dir, files, view, size, batches):
        self.data_dir, self.files, self.view = data_dir, files, view
        self.size, self.batches = size, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        batch = self.batches[i]
        images = torch.empty(len(batch), self.size, self.size, 3, dtype=torch.uint8)
        for place, number in enumerate(batch):
            path = os.path.join(self.data_dir, os.fsdecode(self.files[number]))
            with naming(path):
                images[place] = self.view(read_image(path), number).permute(1, 2, 0)
        return images


class ErrorsAsItems(Dataset):
    """The same items; an ImageError is one too. DataLoader would wrap a traceback around it."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return self.items[i]
        except ImageError as error:
            return error


def read_in_order(items, workers, pin_memory=False):
    """A torch Dataset's items in order, by `workers` processes (0: this one). Raises ImageError."""
    generator = torch.Generator()  # its own: the program's draws do not depend on `workers`
    loader = DataLoader(ErrorsAsItems(items), batch_size=None, num_workers=workers,
                        pin_memory=pin_memory, worker_init_fn=leave_group, generator=generator)
    child = getattr(signal, "SIGCHLD", None)  # Windows has none, nor process groups
    handler = child and signal.getsignal(child)
    try:
        reading = iter(loader)
        # torch's handler would raise in the middle of a step; next() does too
        with contextlib.suppress(ValueError, TypeError):  # in another thread, or without SIGCHLD
            signal.signal(child, handler)
        for item in reading:
            if isinstance(item, ImageError):
                raise item
            yield item
    except Exception as error:
        if workers:
            error.with_traceback(None)  # its frames, DataLoader's, would keep the workers
        if "DataLoader worker (pid" not in str(error):
            raise error  # a bare raise brings them back on Python 3.10
        raise ImageError(f"a process that reads images has ended ({error}): "
                         "try fewer --workers") from error
    finally:
        reading = None  # ends the workers now, though a traceback may keep this frame


def leave_group(worker):
    """Ctrl-C and torchrun's SIGTERM go to a process group; a step that ends needs its workers."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but SIGTERM, by which the program ends a worker
