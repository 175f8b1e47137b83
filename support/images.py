"""Images of a user's: decoding, RGB, views, and reading by worker processes."""

import contextlib
import io
import os
import signal
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_start_method
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.Image import Transpose
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
# what makes an image upright, by EXIF's orientation
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}
# a PNG's transparent value in the 8 bits that Pillow makes of others, by `raw_mode`
KEYS = {"L;2": lambda gray: 85 * gray, "L;4": lambda gray: 17 * gray,
        "RGB;16B": lambda color: tuple(value >> 8 for value in color)}
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


def opened(path, use):
    """use(image) of a file that Pillow opens;
    where it refuses the metadata, of the file without."""
    try:
        with Image.open(path) as image:  # reads the header only
            return use(image)
    except MemoryError:
        raise
    except Exception:  # each of Pillow's formats raises what it likes
        with contextlib.suppress(Exception):  # the first error tells more
            bare = without_metadata(Path(path).read_bytes())
            with Image.open(io.BytesIO(bare)) as image:
                return use(image)
        raise


def without_metadata(content):
    """The bytes of a PNG or JPEG, less all that is neither pixels, their meaning nor EXIF."""
    number = lambda at, size: int.from_bytes(content[at:at + size], "big")
    if content.startswith(b"\x89PNG"):
        kept, at = [content[:8]], 8
        while at < len(content):
            size, kind = 12 + number(at, 4), content[at + 4:at + 8]
            chunk = content[at:at + size]
            exif = kind == b"eXIf" and zlib.crc32(chunk[4:-4]) == number(at + size - 4, 4)
            if exif or kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(chunk)
            at += size
        return b"".join(kept)
    kept, at = [content[:2]], 2
    while content.startswith(b"\xff\xd8") and content[at] == 0xff and content[at + 1] != 0xda:
        size, kind = 2 + number(at + 2, 2), content[at + 1]
        segment = content[at:at + size]
        meaning = kind in (0xe0, 0xee) and size >= 16  # JFIF and Adobe: the kind of colour
        exif = kind == 0xe1 and segment[4:].startswith(b"Exif")
        if meaning or exif or not (0xe0 <= kind <= 0xef or kind == 0xfe):
            kept.append(segment)
        at += size
    return b"".join(kept) + content[at:]


def to_rgb(image, upright=True):
    """Any Pillow image to RGB, on white where it is transparent. upright: turned as EXIF says.

    Raises ValueError for values whose scale nothing tells.
    """
    raw = raw_mode(image)
    image.load()  # raises for broken pixels, and for metadata behind them
    key = image.info.get("transparency")
    if key is not None and raw in KEYS:
        image.info["transparency"] = KEYS[raw](key)
    if upright and (turn := find_turn(image)) is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        gray = to_gray(image, raw)
        if isinstance(key, int):
            gray[np.asarray(image) == key] = 255
        return Image.fromarray(gray).convert("RGB")
    if ";16" in raw and len(image.getbands()) > 1:  # Pillow keeps the upper 8 bits
        high = max(high for _, high in image.getextrema()[:3])
        if 0 < high < 16:
            raise ValueError(f"the upper 8 of its 16 bits end at {high}, all but black: save it "
                             "with 8 bits, 0 to 255")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def raw_mode(image):
    """How a file stores its pixels, in Pillow's words, before they are loaded; "" if unknown."""
    tiles = getattr(image, "tile", None)
    how = tiles[0][3] if tiles else ""  # the decoder's arguments
    return str(how[0] if isinstance(how, tuple) and how else how)


def find_turn(image):
    """What makes a Pillow image upright; None for nothing, or where EXIF cannot be read."""
    with contextlib.suppress(Exception):  # it may hold anything
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


def to_gray(image, raw):
    """uint8 [h, w] of a Pillow image of 12 to 32 bits. raw: its `raw_mode`.

    Integers have 8, 10, 12 or 16 bits, the fewest that hold them, unless the file says how many.
    Floats run to 1 or to 255. Raises ValueError for all others, and for what would be black.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        bits = 0 if high <= 1 else 8 if high <= 255 else None
    else:
        signed = raw in ("I;16S", "I;16BS")
        widths = {"I;12": [12], "L": [16]}.get(raw, [8, 10, 12, 16 - signed])  # L: PGM's own white
        bits = next((n for n in widths if high < 2 ** n), None)
    if low < 0 or bits is None or bits == 8 and 0 < high < 16:  # of NaN bits are None
        raise ValueError(f"its values run from {low:.6g} to {high:.6g}, which tells no scale: save "
                         "it with 8 bits, 0 to 255")
    if bits == 0:
        return (255 * values).round().astype(np.uint8)
    return (values if bits == 8 else values >> (bits - 8)).astype(np.uint8)


def read_image(path, upright=True):
    """uint8 [3, h, w]; an RGB JPEG by torchvision, it is faster. Raises: see `naming`."""
    def pixels(image):
        is_jpeg = image.format == "JPEG" and image.mode == "RGB"
        if decode_jpeg and is_jpeg and not (upright and find_turn(image) is not None):
            with contextlib.suppress(RuntimeError):  # Pillow may read what this refuses
                return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
        return torch.from_numpy(np.array(to_rgb(image, upright))).permute(2, 0, 1)

    return opened(path, pixels)


def decode(data_dir, files, size):
    """uint8 [n, size, size, 3]. files: bytes [n], paths below data_dir. Raises ImageError."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def decode_one(i):
        path = os.path.join(data_dir, os.fsdecode(files[i]))
        with naming(path):  # of an animation the first frame
            images[i] = opened(path, lambda image: np.asarray(fit(to_rgb(image), size)))

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
    """RandomResizedCrop and flip of uint8 [3, h, w], a function of the key alone."""

    def __init__(self, size, flip):
        steps = [v2.RandomResizedCrop(size, antialias=True)]
        self.transform = v2.Compose(steps + [v2.RandomHorizontalFlip()] * flip)

    def __call__(self, image, key):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.seed(key))
            return self.transform(image)


class CentreView:
    """uint8 [3, h, w] at evaluation: the shorter side to `resize`, the middle [3, size, size].

    What is longer than 16 times its width is cut first: resized it might not fit in memory.
    """

    def __init__(self, resize, size):
        self.transform = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])

    def __call__(self, image, key=None):
        short, long = sorted(image.shape[-2:])
        if long > 16 * short:
            long = 16 * short + long % 2  # as even as it was: the middle stays
            image = v2.functional.center_crop(image, [min(side, long) for side in image.shape[-2:]])
        return self.transform(image)


class BatchOfImages:
    """Called with numbers [b] and a key: these images, uint8 [b, size, size, 3].

    files: bytes [n], paths below data_dir. view: uint8 [3, h, w], key -> uint8 [3, size, size];
    each image's key is "KEY,NUMBER".
    """

    def __init__(self, data_dir, files, view, size):
        self.data_dir, self.files, self.view, self.size = data_dir, files, view, size

    def __call__(self, numbers, key):
        images = torch.empty(len(numbers), self.size, self.size, 3, dtype=torch.uint8)
        for place, number in enumerate(numbers):
            path = os.path.join(self.data_dir, os.fsdecode(self.files[number]))
            with naming(path):
                image = self.view(read_image(path), f"{key},{number}")
                images[place] = image.permute(1, 2, 0)
        return images


class Calls(Dataset):
    """Item r is read(*r), or the ImageError: DataLoader would wrap a traceback around it."""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, request):
        try:
            return self.read(*request)
        except ImageError as error:
            return error


class Reader:
    """Called with a list of requests r: read(*r) for each, in order. Raises ImageError.

    read: it has no state. workers: the processes that call it (0: this one). Where a process starts
    by fork, in milliseconds, they end with the list; elsewhere that takes seconds, and they stay.
    """

    def __init__(self, read, workers, pin_memory=False):
        self.read, self.workers, self.pin_memory = read, workers, pin_memory
        self.kept = None  # a DataLoader with its processes

    def __getstate__(self):
        return self.__dict__ | dict(kept=None)  # a process that it starts gets none

    def __call__(self, requests):
        loader, self.kept = self.kept or self.loader(), None
        loader.sampler[:] = requests
        for place, item in enumerate(read_in_order(loader), 1):
            if place == len(requests) and loader.persistent_workers:
                self.kept = loader
            yield item

    def loader(self):
        stay = self.workers > 0 and get_start_method() != "fork"
        # a generator of its own: the program's draws do not depend on `workers`
        return DataLoader(Calls(self.read), sampler=[], batch_size=None, num_workers=self.workers,
                          pin_memory=self.pin_memory, worker_init_fn=outlive_signals,
                          generator=torch.Generator(), persistent_workers=stay)


def read_in_order(loader):
    """A DataLoader's items, an ImageError among them raised."""
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
        if loader.num_workers:
            error.with_traceback(None)  # its frames, DataLoader's, would keep the workers
        if "DataLoader worker (pid" not in str(error):
            raise error  # a bare raise brings them back on Python 3.10
        raise ImageError(f"a process that reads images has ended ({error}): "
                         "try fewer --workers") from error
    finally:
        reading = None  # ends the workers now, though a traceback may keep this frame


def outlive_signals(worker):
    """The step that a signal lets end needs its workers, whoever sends it to them, too.

    Ctrl-C and torchrun reach a process group; pkill, a scheduler and systemd reach every process.
    SIGTERM is also how the program ends a worker that hangs: it lives on for half a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(os, "setpgid"):  # Windows
        return
    os.setpgid(0, 0)
    for other in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
