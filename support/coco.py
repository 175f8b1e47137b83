"""Images with objects and masks, in COCO's form or Penn-Fudan's. Needs pycocotools."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from support.console import UserError, shorten
from support.images import naming

try:
    from pycocotools import coco
    from pycocotools import mask as coco_mask
except ImportError:  # detect.py says what to install
    coco = None


@dataclass
class Pictures:
    """One split. index: pycocotools' COCO. ids: of the images in use. classes: by category id."""

    folder: Path
    index: object
    ids: list
    classes: list

    def load(self, number, flip=False):
        """The image with this id, uint8 [3, H, W], and its target.

        boxes [n, 4] (x1, y1, x2, y2), labels [n] from 1 on, masks [n, H, W]. As in torchvision's
        references, crowds and boxes without area are left out. Raises ImageError.
        """
        order = sorted(self.index.cats)
        entry = self.index.imgs[number]
        path, h, w = self.folder / entry["file_name"], entry["height"], entry["width"]
        objects = [a for a in self.index.imgToAnns[number] if not a["iscrowd"]]
        with naming(path), Image.open(path) as image:
            if image.size != (w, h):
                raise ValueError(f"it is {image.width}x{image.height}, its annotation says {w}x{h}")
            image = transforms.pil_to_tensor(image.convert("RGB"))  # as stored: boxes ignore EXIF
            masks = np.array([self.index.annToMask(a) for a in objects], np.uint8)
            masks = torch.from_numpy(masks.reshape(-1, h, w))  # [n, H, W]
        labels = torch.tensor([order.index(a["category_id"]) + 1 for a in objects]).long()
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, w, h -> x1, y1, x2, y2
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, dict(boxes=boxes[keep], labels=labels[keep], masks=masks[keep])


class Plan(torch.utils.data.Dataset):
    """A split's images in a given order, items (image, target). order: (id, flip) of each."""

    def __init__(self, pictures, order):
        self.pictures, self.order = pictures, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.pictures.load(*self.order[i])


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
    """Pictures in `folder` by a file in COCO's form (its `content`), less objects without mask."""
    try:
        content = content or json.loads(source.read_bytes())
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        for image in content["images"]:
            if not (image["file_name"] and image["width"] > 0 and image["height"] > 0):
                raise ValueError(f"image {image['id']} lacks a name or a size")
        for a in content["annotations"]:
            mask = a.get("segmentation")
            if isinstance(mask, list):  # pycocotools would take fewer than three points for a box
                a["segmentation"] = [polygon for polygon in mask if len(polygon) >= 6]
        objects = [a for a in content["annotations"] if a.get("segmentation")]
        for number, a in enumerate(objects, start=1):  # COCOeval takes number 0 for no object
            _ = names[a["category_id"]]  # raises KeyError for an unknown one
            _, _, w, h = map(float, a["bbox"])
            area = w * h if a.get("area") is None else a["area"]
            a |= dict(id=number, iscrowd=int(a.get("iscrowd") or 0), area=area)
        index = coco.COCO()
        index.dataset = {**content, "annotations": objects}
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        ids = sorted(index.imgs)
    except Exception as error:  # a user's file may hold anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"annotations {source} are not in COCO's form ({reason})") from None
    return Pictures(folder, index, ids, [names[c] for c in sorted(names)])


def pennfudan(folder, split):
    """Penn-Fudan's masks of instance numbers in COCO's form; every fifth image is for testing."""
    pattern = "*.[jp][pn]g"
    paths = sorted([*(folder / "images").glob(pattern), *(folder / "PNGImages").glob(pattern)])
    if not paths:
        raise UserError(f"--data-dir {folder} holds neither images/ and masks/ nor PNGImages/ and "
                        "PedMasks/")
    images, annotations, categories = [], [], [dict(id=1, name="person")]
    for number, path in enumerate(paths):
        if (number % 5 == 4) != (split == "val"):
            continue
        mask = folder / "masks" / f"{path.stem}.png"
        if path.parent.name == "PNGImages":  # the names in the archive
            mask = folder / "PedMasks" / f"{path.stem}_mask.png"
        with naming(mask), Image.open(mask) as image:
            numbers = np.array(image)  # [H, W], 0 is background
        h, w = numbers.shape[:2]
        images.append(dict(id=number, file_name=path.name, height=h, width=w))
        for k in np.unique(numbers[numbers > 0]):
            rle = coco_mask.encode(np.asfortranarray(numbers == k, np.uint8))
            area, box = float(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
            annotations.append(dict(image_id=number, category_id=1, area=area, bbox=box,
                                    segmentation=rle))
    content = dict(images=images, annotations=annotations, categories=categories)
    return annotated(paths[0].parent, folder, content)
