"""Images with objects and masks, in COCO's form or Penn-Fudan's. Needs pycocotools."""

import contextlib
import io
import json
import math
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from support.console import UserError, shorten
from support.images import ENDINGS, Reader, naming, opened, raw_mode, read_image

try:
    from pycocotools import coco
    from pycocotools import mask as coco_mask
except ImportError:  # detect.py says what to install
    coco = None

WITHOUT_LOSS = {".png", ".bmp", ".tif", ".tiff"}  # endings of masks


@dataclass
class Pictures:
    """One split. index: pycocotools' COCO. ids: of the images in use. classes: by category id."""

    folder: Path
    index: object
    ids: list
    classes: list
    reader: Reader = None

    def read(self, requests, workers):
        """`load` of each (id, flip), in order, by `workers` processes. Raises ImageError."""
        self.reader = self.reader or Reader(self.load, workers)
        yield from self.reader(requests)

    def load(self, number, flip=False):
        """The image with this id, uint8 [3, H, W], and its target.

        boxes [n, 4] (x1, y1, x2, y2), labels [n] from 1 on, masks [n, H, W]. Crowds are left out,
        and boxes under 0.01 pixels, which may vanish when they are resized. Raises ImageError.
        """
        order = sorted(self.index.cats)
        entry = self.index.imgs[number]
        path, h, w = self.folder / entry["file_name"], entry["height"], entry["width"]
        objects = [a for a in self.index.imgToAnns[number] if not a["iscrowd"]]
        with naming(path):
            image = read_image(path, upright=False)  # as stored: boxes ignore EXIF
            check_size((image.shape[2], image.shape[1]), entry)
            masks = np.array([self.index.annToMask(a) for a in objects], np.uint8)
            masks = torch.from_numpy(masks.reshape(-1, h, w))  # [n, H, W]
        labels = torch.tensor([order.index(a["category_id"]) + 1 for a in objects]).long()
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, w, h -> x1, y1, x2, y2
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        keep = (boxes[:, 2:] - boxes[:, :2] >= 0.01).all(1)
        return image, dict(boxes=boxes[keep], labels=labels[keep], masks=masks[keep])

    def check_files(self):
        """Raises ImageError, which names it, for a missing file or one of another size."""
        for number in self.ids:
            entry = self.index.imgs[number]
            with naming(path := self.folder / entry["file_name"]):
                check_size(opened(path, lambda image: image.size), entry)


def check_size(size, entry):
    if size != (entry["width"], entry["height"]):
        raise ValueError("it is {}x{}, its annotation says {width}x{height}".format(*size, **entry))


def load_splits(name, folder, known=None, splits=("train", "val")):
    """The Pictures of each split. known: the classes of a checkpoint. Raises UserError."""
    folder = Path(os.path.expanduser(folder or "data"))
    if name == "pennfudan":
        *train_sets, test_set = (pennfudan(folder, split) for split in splits)
    else:
        parts = [f"{split}2017" if name == "coco" else split for split in splits]
        sources = [folder / f"annotations/instances_{part}.json" for part in parts]
        *train_sets, test_set = map(annotated, [folder / part for part in parts], sources)
    all_classes = [("the training set", pictures.classes) for pictures in train_sets]
    for what, classes in [*all_classes, ("the checkpoint", known or test_set.classes)]:
        if classes != test_set.classes:
            raise UserError(f"{what} has other classes ({shorten(classes)}) than the test set in "
                            f"{folder} ({shorten(test_set.classes)})")
    for pictures in train_sets:  # as torchvision's references: with a box above a pixel
        objects = pictures.index.imgToAnns
        pictures.ids = [i for i in pictures.ids if any(min(a["bbox"][2:]) > 1 for a in objects[i])]
    nothing_to_find = all(a["iscrowd"] for a in test_set.index.anns.values())
    if nothing_to_find or not all(pictures.ids for pictures in train_sets):
        raise UserError(f"no training image, or no test image, in {folder} has an object with a "
                        "mask")
    return *train_sets, test_set


def annotated(folder, source, content=None):
    """Pictures in `folder` by a file in COCO's form (its `content`), less objects without mask.

    Raises UserError, which names image and annotation, where one does not fit the other.
    """
    try:
        content = content or json.loads(source.read_bytes())
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        if len(names) < len(content["categories"]):
            raise ValueError("two categories have one id")
        images = by_id(content["images"])
        objects = []
        for a in content["annotations"]:
            image = images.get(a["image_id"])
            if image is None:
                raise ValueError(f"annotation {a.get('id')} is of image {a['image_id']}, which is "
                                 "not listed")
            try:
                if check_object(a, image, names):
                    objects.append(a)
            except Exception as error:
                raise ValueError(f"image {image['id']} ({image['file_name']}), annotation "
                                 f"{a.get('id')}: {in_words(error)}") from None
        for number, a in enumerate(objects, start=1):  # COCOeval takes number 0 for no object
            a["id"] = number
        index = coco.COCO()
        index.dataset = {**content, "images": list(images.values()), "annotations": objects}
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        ids = sorted(index.imgs)
    except Exception as error:  # a user's file may hold anything
        raise UserError(f"annotations {source} are not in COCO's form ({in_words(error)}): mend or "
                        "remove what is wrong") from None
    return Pictures(folder, index, ids, [names[c] for c in sorted(names)])


def in_words(error):
    return f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"


def by_id(images):
    """The images by id, their sizes as int. Raises ValueError."""
    known = {}
    for image in images:
        number, name, sides = image["id"], image["file_name"], (image["width"], image["height"])
        if number in known:
            raise ValueError(f"two images have the id {number}: {known[number]['file_name']}, "
                             f"{name}")
        whole = [isinstance(side, (int, float)) and side > 0 == side % 1 for side in sides]
        if not (name and isinstance(name, str) and all(whole)):
            raise ValueError(f"image {number} lacks a name or a size")
        known[number] = image | dict(zip(("width", "height"), map(int, sides), strict=True))
    return known


def check_object(a, image, names):
    """Whether an annotation has a mask; what it leaves open is filled in.

    Raises an error of any kind unless its numbers are finite and fit the image.
    """
    w, h, mask = image["width"], image["height"], a.get("segmentation")
    if isinstance(mask, list):  # pycocotools would take fewer than three points for a box
        a["segmentation"] = mask = [polygon for polygon in mask if len(polygon) >= 6]
    if not mask:
        return False
    if a["category_id"] not in names:
        raise ValueError(f"no category has the id {a['category_id']}")
    x, y, box_w, box_h = a["bbox"]
    check_inside("box", [x, x + box_w], [y, y + box_h], image)
    area = box_w * box_h if a.get("area") is None else a["area"]
    if not (box_w >= 0 and box_h >= 0 and 0 <= area < math.inf):
        raise ValueError(f"its box {a['bbox']} or its area {area} is below 0 or not finite")
    a |= dict(iscrowd=int(a.get("iscrowd") or 0), area=area)
    if a["iscrowd"] not in (0, 1):
        raise ValueError(f"its iscrowd is {a['iscrowd']}, neither 0 nor 1")
    if isinstance(mask, list):
        if any(len(polygon) % 2 for polygon in mask):
            raise ValueError("a polygon has an odd number of coordinates")
        x, y = (list(chain.from_iterable(polygon[i::2] for polygon in mask)) for i in (0, 1))
        check_inside("mask", x, y, image)
    elif list(mask["size"]) != [h, w]:
        raise ValueError(f"its mask has the size {mask['size']}, the image [{h}, {w}]")
    else:
        runs = run_lengths(mask["counts"])
        if not (runs.sum() == h * w and (runs >= 0).all() and (runs % 1 == 0).all()):
            raise ValueError(f"the counts of its mask are not those of {h} x {w} pixels")
    return True


def check_inside(what, x, y, image):
    """Raises ValueError unless the points are in part inside, none more than its side outside."""
    for values, side in ((x, image["width"]), (y, image["height"])):
        try:
            low, high = min(values), max(values)
            near = -side <= low <= side and 0 <= high <= 2 * side
            good = near and math.isfinite(sum(values))  # min and max may pass over NaN
        except TypeError:  # null, a text
            good = False
        if not good:
            raise ValueError(f"its {what} has coordinates that are no finite numbers, or lie "
                             f"outside the image of {image['width']}x{image['height']}")


def run_lengths(counts):
    """The runs of an RLE, [runs], listed or compressed. Raises ValueError.

    Compressed each has up to seven characters of 5 bits, the lowest first, as a difference from the
    run two before it, but for the first three.
    """
    if isinstance(counts, list):
        return np.array(counts, np.float64)
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    codes = codes.astype(np.int64) - 48  # [characters]
    ends = np.flatnonzero(codes & 32 == 0)  # the sixth bit: it goes on
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1  # [runs]
    if (codes >> 6).any() or ends[-1] != len(codes) - 1 or lengths.max() > 7:
        raise ValueError("the counts of its mask are no compressed RLE")
    shifts = 5 * (np.arange(len(codes)) - starts.repeat(lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= (codes[ends] >> 4 & 1) << 5 * lengths  # the fifth bit of the last: below 0
    for every_other in (runs[1::2], runs[2::2]):
        every_other[:] = every_other.cumsum()
    return runs


def pennfudan(folder, split):
    """Penn-Fudan's masks of instance numbers in COCO's form; every fifth image is for testing."""
    paths = sorted([*find(folder / "images"), *find(folder / "PNGImages")])
    if not paths:
        raise UserError(f"--data-dir {folder} holds neither images/ and masks/ nor PNGImages/ and "
                        "PedMasks/")
    masks = {path.with_suffix(""): path for name in ("masks", "PedMasks")
             for path in find(folder / name, WITHOUT_LOSS)}
    images, annotations, categories = [], [], [dict(id=1, name="person")]
    for number, path in enumerate(paths):
        if (number % 5 == 4) != (split == "val"):
            continue
        mask = folder / "masks" / path.stem
        if path.parent.name == "PNGImages":  # the names in the archive
            mask = folder / "PedMasks" / f"{path.stem}_mask"
        mask = masks.get(mask, f"{mask}.png")
        with naming(mask):
            numbers = opened(mask, instance_numbers)  # [H, W], 0 is background
        h, w = numbers.shape
        images.append(dict(id=number, file_name=path.name, height=h, width=w))
        for k in np.unique(numbers[numbers > 0]):
            rle = coco_mask.encode(np.asfortranarray(numbers == k, np.uint8))
            area, box = float(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
            annotations.append(dict(image_id=number, category_id=1, area=area, bbox=box,
                                    segmentation=rle))
    content = dict(images=images, annotations=annotations, categories=categories)
    return annotated(paths[0].parent, folder, content)


def find(folder, endings=ENDINGS):
    """The images right in a folder, PNGs last; none where there is no folder."""
    with contextlib.suppress(OSError):
        found = [path for path in folder.iterdir() if path.suffix.lower() in endings]
        found = [path for path in found if not path.name.startswith(".")]
        return sorted(found, key=lambda path: path.suffix.lower() == ".png")
    return []


def instance_numbers(image):
    """[H, W] of a Pillow image whose pixels are numbers, in one channel or in several equal ones.

    Raises ValueError for any other.
    """
    bands, deep, numbers = image.getbands(), ";16" in raw_mode(image), np.array(image)
    if numbers.ndim == 3:
        colors = numbers[..., :-1] if bands[-1] == "A" else numbers
        hidden = bands[-1] == "A" and (numbers[..., -1] == 0) & colors.any(-1)
        if deep or np.any(hidden) or (colors != colors[..., :1]).any():  # of 16 bits 8 are read
            raise ValueError(f"a mask of mode {image.mode} from which no number can be read: save "
                             "it as gray, each pixel 0 or its object's number")
        numbers = colors[..., 0]
    if (numbers % 1).any():
        raise ValueError("its pixels are no whole numbers: save it as gray, each pixel 0 or its "
                         "object's number")
    return numbers
