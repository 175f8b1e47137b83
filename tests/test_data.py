"""data.py, support/images.py, support/synthetic.py:
plans, batches, folders, streaming, CIFAR; no network."""

import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import urllib.request
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop

import data
import options
import train
from data import Batch, augment, cut, epoch_plan, normalise
from support import images as images_module
from support.console import ImageError, UserError
from support.images import CentreView, RandomView, Reader, decode, naming, read_image
from support.synthetic import paint


@pytest.fixture(scope="module")
def synthetic():
    return data.load("synthetic")


@pytest.fixture
def small(synthetic):
    """A short InMemory: 601 training and 1,030 test images."""
    return replace(synthetic, **{f"{split}_{name}": getattr(synthetic, f"{split}_{name}")[:count]
                                 for split, count in (("train", 601), ("test", 1030))
                                 for name in ("images", "labels")})


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """60 + 60 JPEG images of two classes, 40 x 30 pixels, to be streamed at 32."""
    root = write_folder(tmp_path_factory.mktemp("stream"), count=30, size=(40, 30), ending="jpg")
    return data.load("folder", root, stream=True)


def write_folder(root, splits=("train", "test"), classes=("cat", "dog"), size=(32, 32), count=3,
                 ending="png"):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(
                    0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{ending}")
    return root


def columns(rows):
    """The batches' columns, each joined."""
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def equal(these, those):
    """Whether two lists of tuples of tensors have the same bits."""
    return all(a.equal(b) for pair in zip(these, those, strict=True)
               for a, b in zip(*pair, strict=True))


def message(name, data_dir, **options):
    with pytest.raises(UserError) as caught:
        data.load(name, data_dir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- plans

EQUAL_100 = torch.arange(5000) % 100
EQUAL_10 = torch.arange(1000) % 10
# 501: one stays alone
UNEQUAL = torch.arange(7).repeat_interleave(torch.tensor([1, 2, 33, 400, 7, 0, 58]))
SINGLES = torch.arange(40)


@pytest.mark.parametrize("labels, batch_size", [
    (EQUAL_100, 128),
    (EQUAL_10, 64),
    (UNEQUAL, 16),
    (UNEQUAL[1:], 16),
    (UNEQUAL, 500),
    (SINGLES, 8),
    (torch.zeros(3, dtype=torch.int64), 2),
])
def test_plan_shows_every_image_once_in_spread_pairs_or_uniformly(labels, batch_size):
    n, steps = len(labels), len(labels) // batch_size
    for pairs in (False, True):
        plan = epoch_plan(labels, batch_size, pad=4, seed=1, epoch=2, pairs=pairs)
        assert len(plan) == steps
        assert torch.cat([b.index for b in plan]).sort().values.equal(torch.arange(n))
        sizes = [len(b.index) for b in plan]
        assert max(sizes) - min(sizes) <= 1 + pairs and min(sizes) >= batch_size

    pairs_of = labels.bincount() // 2
    same = Counter()
    for batch in plan:
        assert len(batch.index) == len(batch.top) == len(batch.left) == len(batch.flip)
        # less an image that stays alone
        pairs = labels[batch.index[:len(batch.index) // 2 * 2]].view(-1, 2)
        dealt = pairs[pairs[:, 0] == pairs[:, 1], 0].bincount(minlength=len(pairs_of))
        assert (dealt <= -(-pairs_of // steps)).all()
        same.update(dict(enumerate(dealt.tolist())))
    assert sum(size % 2 for size in sizes) == n % 2
    # every pair that a class can make
    assert [same[c] for c in range(len(pairs_of))] == pairs_of.tolist()


def test_plan_of_cifar100():
    labels = torch.arange(50_000) % 100
    plan = epoch_plan(labels, 128, pad=4, seed=0, epoch=0)
    assert Counter(len(b.index) for b in plan) == {128: 350, 130: 40}
    # all pairs differ in class
    assert all(len(labels[b.index].unique()) == len(b.index) // 2 for b in plan)
    digest = hashlib.sha256(
        b"".join(column.numpy().tobytes() for column in columns(plan))).hexdigest()
    assert digest.startswith("37917740b75a0f95")  # published logs were made with these batches


@pytest.mark.parametrize("pairs", [True, False])
def test_plan_is_a_function_of_seed_and_epoch(pairs):
    def flat(seed, epoch):
        torch.manual_seed(next(others))
        state, plan = torch.get_rng_state(), columns(
            epoch_plan(EQUAL_100, 128, 4, seed, epoch, pairs))
        assert torch.get_rng_state().equal(state)
        return plan

    others = itertools.count()
    first = flat(0, 1)
    assert equal([first], [flat(0, 1)])
    for other in (flat(0, 2), flat(1, 0), flat(1, 1)):
        assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


def test_plan_is_shuffled():
    first, second = (epoch_plan(EQUAL_100, 128, 4, 0, epoch) for epoch in (0, 1))

    def partners(plan):
        return {tuple(sorted(pair)) for b in plan for pair in b.index.view(-1, 2).tolist()}

    assert len(partners(first) & partners(second)) < 0.1 * len(EQUAL_100) / 2  # 1 / 49 expected
    for plan in (first, epoch_plan(EQUAL_100, 128, 4, 0, 0, pairs=False)):
        classes = EQUAL_100[columns(plan)[0]]
        assert abs(torch.corrcoef(torch.stack([classes.double(), torch.arange(5000.)]))[0, 1]) < 0.1
    large = [len(b.index) > 128 for plan in (first, second) for b in plan]
    # the large batches are at other places
    assert len(set(map(tuple, (large[:39], large[39:])))) == 2


def test_plan_draws_offsets_and_flips_evenly():
    _, top, left, flip = columns(epoch_plan(EQUAL_100, 128, pad=4, seed=3, epoch=0))
    for offsets in (top, left):
        assert offsets.dtype == torch.int64
        assert (offsets.bincount(minlength=9) - 5000 / 9).abs().max() < 100 and offsets.max() == 8
    assert not top.equal(left)
    assert flip.dtype == torch.bool and 2300 < flip.sum() < 2700


@pytest.mark.parametrize("batch_size", [0, -2, 1, 7, 42])
def test_batch_sizes_that_do_not_fit(small, batch_size):
    few = replace(small, train_labels=torch.arange(41))
    assert few.steps_per_epoch(20) == 2
    for refuse in (few.steps_per_epoch, lambda size: epoch_plan(SINGLES, size, 4, 0, 0)):
        with pytest.raises(UserError, match="batch size .* 40 is the largest that fits"):
            refuse(batch_size)


@pytest.mark.parametrize("labels, unit", [(UNEQUAL, 2), (EQUAL_10, 2), (UNEQUAL, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_equal_and_keep_pairs_together(labels, unit, size):
    left_out = []
    for epoch in (0, 1):
        seen = []
        for batch in epoch_plan(labels, 14, 4, 0, epoch, pairs=unit == 2):
            shares = [cut(batch, (rank, size), pairs=unit == 2) for rank in range(size)]
            length = len(batch.index) // unit // size * unit
            assert {len(column) for share in shares for column in share} == {length}
            joined = Batch(*columns(shares))
            assert equal([joined], [[column[:len(joined.index)] for column in batch]])
            seen.append(joined.index)
        left_out.append(set(range(len(labels))) - set(torch.cat(seen).tolist()))
    assert left_out[0] != left_out[1]


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("height, width, pad", [(32, 32, 4), (9, 7, 1), (8, 8, 0)])
def test_augment_crops_as_torchvision_does(height, width, pad):
    images = torch.randint(1, 256, (50, height, width, 3), dtype=torch.uint8)
    for batch in epoch_plan(torch.arange(50) % 5, 20, pad, seed=0, epoch=0):
        crops = augment(images, batch, pad)
        assert crops.dtype == torch.uint8
        for i, top, left, flip, crop in zip(*batch, crops, strict=True):
            want = tvf.crop(tvf.pad(images[i].permute(2, 0, 1), pad), top, left, height, width)
            want = tvf.hflip(want) if flip else want
            assert crop.permute(2, 0, 1).equal(want)


def test_normalise():
    images = torch.randint(0, 256, (5, 8, 6, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    out = normalise(images, mean, std)
    want = images.permute(0, 3, 1, 2).double() / 255 - mean.double().view(3, 1, 1)
    want = want / std.double().view(3, 1, 1)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_batches_in_memory(small):
    mean, std = torch.tensor(small.mean), torch.tensor(small.std)
    plan = epoch_plan(small.train_labels, 100, 4, 5, 3)  # pad: an eighth of 32
    want = [(normalise(augment(small.train_images, b, 4), mean, std),
             small.train_labels[b.index], b.index)
            for b in plan]
    assert len(want) == 6 and equal(small.train_batches(100, seed=5, epoch=3), want)
    assert equal(small.train_batches(100, seed=5, epoch=3, start=4), want[4:])
    test = normalise(small.test_images, mean, std), small.test_labels
    assert equal([columns(small.test_batches())], [test])
    plain, crop = (replace(small, augmentation=name).take(*plan[0])[0] for name in ("none", "crop"))
    assert plain.equal(normalise(small.train_images[plan[0].index], mean, std))
    flip = plan[0].flip[:, None, None, None]
    assert (crop.equal(torch.where(flip, want[0][0].flip(-1), want[0][0]))
            and not crop.equal(want[0][0]))
    calls, take = [], small.take
    # as a recording takes its place
    small.take = lambda *batch: calls.append(batch) or take(*batch)
    assert equal(small.train_batches(100, seed=5, epoch=3), want) and equal(calls, plan)


@pytest.mark.parametrize("kind", ["small", "stream"])
def test_batches_of_shares_are_rows_of_the_whole(request, kind):
    dataset = request.getfixturevalue(kind)
    for pairs in (True, False):
        whole, *halves = (dataset.train_batches(14, 0, 0, 1, pairs=pairs, share=share)
                          for share in ((0, 1), (0, 2), (1, 2)))
        for batch, *shares in zip(whole, *halves, strict=True):
            assert len(shares[0][0]) == len(shares[1][0]) >= 6
            assert equal([columns(shares)], [[column[:2 * len(shares[0][0])] for column in batch]])
    whole = columns(dataset.test_batches())
    for rank in range(7):
        share = columns(dataset.test_batches(share=(rank, 7)))
        assert equal([share], [[column[rank::7] for column in whole]])


@pytest.mark.parametrize("kind", ["small", "stream"])
def test_dataset_moves_to_a_device(request, kind):
    dataset = request.getfixturevalue(kind)
    moved = dataset.to("meta")
    tensors = [name for name, value in vars(dataset).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 4 and {vars(moved)[name].device.type for name in tensors} == {"meta"}
    assert (type(moved) is type(dataset)
            and moved.classes == dataset.classes and moved.mean == dataset.mean)


def test_what_files_say_of_the_data(synthetic):
    assert synthetic.facts() == dict(
        classes=synthetic.classes, mean=synthetic.mean, std=synthetic.std,
        image_size=32, resize=32, digest="synthetic")
    synthetic.check_classes(tuple(synthetic.classes), "out/last.pt", "data")
    words = ("^out/last.pt was trained on other classes .striped disc, .* than those of "
             "--dataset synthetic --data-dir data .shaded disc, .* its own data set$")
    with pytest.raises(UserError, match=words):
        synthetic.check_classes(synthetic.classes[1:], "out/last.pt", "data")


@pytest.mark.parametrize("stream", [False, True])
def test_validation_split_of_a_folder_without_test(tmp_path, stream):
    write_folder(tmp_path, splits=("train",), count=11)
    (tmp_path / "train" / "dog" / "0.png").unlink()

    def split(fraction=0.2, seed=0):
        loaded = data.load("folder", tmp_path, stream=stream,
                           validation_fraction=fraction, seed=seed)
        return loaded, columns(loaded.test_batches("validation"))

    loaded, (images, labels) = split()
    assert (labels.tolist() == [0] * 2 + [1] * 2
            and loaded.train_labels.tolist() == [0] * 9 + [1] * 8)
    assert "the validation images are the test set too" in loaded.notes[-1]
    assert equal(loaded.test_batches(), [(images, labels)])
    assert equal([split()[1]], [(images, labels)]) and not split(seed=1)[1][0].equal(images)
    if stream:
        assert len({*loaded.train_files, *loaded.validation_files}) == 21
    for fraction, want in ((0.01, [1, 1]), (0.99, [10, 9])):
        assert split(fraction)[1][1].bincount().tolist() == want


def test_validation_split_in_memory(synthetic, monkeypatch):
    every = [getattr(synthetic, f"{split}_{name}")
             for split in ("train", "test") for name in ("images", "labels")]
    monkeypatch.setattr(data, "synthetic", lambda *_: (synthetic.classes, *every))
    split = data.load("synthetic", validation_fraction=0.1)
    assert split.validation_labels.bincount().tolist() == [50] * 20
    assert split.test_images.equal(synthetic.test_images)
    both = torch.cat([split.train_images, split.validation_images]).numpy()
    as_set = lambda images: {image.tobytes() for image in images}
    assert as_set(both) == as_set(synthetic.train_images.numpy())
    assert split.mean == data.mean_std(split.train_images)[0] != synthetic.mean
    assert len(synthetic.validation_labels) == len(synthetic.validation_images) == 0


# ---------------------------------------------------------------- synthetic

def assert_mean_and_std(loaded):
    pixels = loaded.train_images.double().flatten(0, 2) / 255
    want = torch.stack([pixels.mean(0), pixels.std(0, correction=0)])
    torch.testing.assert_close(loaded.mean_std.double(), want, rtol=1e-6, atol=1e-6)


def test_synthetic(synthetic):
    for split, count in (("train", 500), ("test", 100)):
        images, labels = (getattr(synthetic, f"{split}_{name}") for name in ("images", "labels"))
        assert images.shape == (20 * count, 32, 32, 3)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.bincount().tolist() == [count] * 20
    assert len(set(synthetic.classes)) == 20 and "striped disc" in synthetic.classes
    every = torch.cat([synthetic.train_images, synthetic.test_images])
    # no image twice, in either split
    assert len({image.numpy().tobytes() for image in every}) == 12_000
    assert_mean_and_std(synthetic)


def test_fewer_synthetic_images(synthetic):
    """The first ones, with the same test set; no other data set takes the option."""
    few = data.load("synthetic", synthetic_images=400)
    assert (few.train_images.equal(synthetic.train_images[:400])
            and few.train_labels.bincount().tolist() == [20] * 20)
    assert few.test_images.equal(synthetic.test_images)
    assert_mean_and_std(few)
    args = options.parse("", ["--dataset", "synthetic", "--synthetic-images", "40",
                              "--image-size", "8"])
    assert len(train.load_data(args).train_labels) == 40
    for name, count in (("synthetic", 10_001), ("cifar100", 400)):
        with pytest.raises(UserError, match=f"--synthetic-images {count} goes with "
                                            "--dataset synthetic, up to 10000"):
            data.load(name, synthetic_images=count)


def test_synthetic_ignores_and_keeps_the_global_generator():
    def load(seed):
        torch.manual_seed(seed)
        state, loaded = torch.get_rng_state(), data.load("synthetic", image_size=8)
        assert torch.get_rng_state().equal(state)
        return loaded

    first, again = load(7), load(8)
    assert (again.train_images.equal(first.train_images)
            and again.test_images.equal(first.test_images))
    draw = [paint(torch.arange(20), size, torch.Generator().manual_seed(0)) for size in (48, 24)]
    assert [tuple(images.shape) for images in draw] == [(20, 48, 48, 3), (20, 24, 24, 3)]


def test_synthetic_classes_cannot_be_told_by_colour(synthetic):
    """Linear and nearest-mean classifiers on each image's mean colour
    stay near the chance of 5%."""
    train, test = (images.double().flatten(1, 2).mean(1) / 255
                   for images in (synthetic.train_images, synthetic.test_images))
    labels, truth = synthetic.train_labels, synthetic.test_labels
    centres = torch.stack([train[labels == c].mean(0) for c in range(20)])
    assert (torch.cdist(test, centres).argmin(1) == truth).double().mean() < 0.065
    one = [torch.cat([x, torch.ones(len(x), 1)], 1) for x in (train, test)]
    weights = torch.linalg.lstsq(one[0], torch.nn.functional.one_hot(labels).double()).solution
    assert ((one[1] @ weights).argmax(1) == truth).double().mean() < 0.065


# ---------------------------------------------------------------- a folder of images

def test_folder(tmp_path, monkeypatch):
    write_folder(tmp_path, splits=("train", "val"))
    loaded = data.load("folder", str(tmp_path))
    assert loaded.classes == ["cat", "dog"] and loaded.notes == []
    assert loaded.resize == loaded.image_size == 32
    assert loaded.train_labels.tolist() == loaded.test_labels.tolist() == [0] * 3 + [1] * 3
    want = np.stack([np.asarray(Image.open(tmp_path / "train" / "dog" / f"{i}.png"))
                     for i in range(3)])
    assert np.array_equal(loaded.train_images[3:].numpy(), want)
    assert_mean_and_std(loaded)
    write_folder(tmp_path, splits=("test",), count=1)  # goes before val
    monkeypatch.chdir(tmp_path)
    assert len(data.load("folder", ".").test_images) == 2


RED, GRAY = (200, 20, 20), (80, 80, 80)
# mode, colour, what it decodes to, ending
KINDS = [*(("RGB", RED, RED, ending) for ending in ("jpg", "png", "webp")),
         *(("L", 80, GRAY, ending) for ending in ("jpg", "png")), ("LA", (80, 255), GRAY, "png"),
         *(("CMYK", (55, 235, 235, 0), RED, ending) for ending in ("jpg", "tif")),
         *(("P", RED, RED, ending) for ending in ("png", "gif")), ("1", 1, (255, 255, 255), "png"),
         *(("I;16", 80 * 257, GRAY, ending) for ending in ("png", "tif", "pgm")),
         ("RGBA", (*RED, 51), (244, 208, 208), "png")]  # four fifths transparent: so far to white


@pytest.mark.parametrize("stream", [False, True, "without torchvision's decoder"])
def test_folder_takes_every_kind_of_image(tmp_path, monkeypatch, stream):
    if isinstance(stream, str):
        monkeypatch.setattr(images_module, "decode_jpeg", None)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, (mode, colour, _, ending) in enumerate(KINDS):
                exact = dict(webp=dict(lossless=True), jpg=dict(quality=100, subsampling=0))
                file = tmp_path / split / name / f"{i:02}.{ending}"
                Image.new(mode, (32, 32), colour).save(file, **exact.get(ending, {}))
    loaded = data.load("folder", tmp_path, stream=bool(stream), workers=1)
    mean, std = loaded.mean_std[:, :, None, None]
    images, labels = columns(loaded.test_batches())
    assert labels.tolist() == [0] * len(KINDS) + [1] * len(KINDS)
    for image, (mode, _, want, ending) in zip(images, KINDS, strict=False):
        error = (image * std + mean) * 255 - torch.tensor(want)[:, None, None]
        assert error.abs().max() < (4.01 if ending == "jpg" else 1.01), (mode, ending)
    assert sum(len(batch[1]) for batch in loaded.train_batches(4, 0, 0)) == 2 * len(KINDS)


def test_folder_takes_transparent_palettes_first_frames_and_orientation(tmp_path):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\xff\x00")  # colour 1 is transparent
    Image.new("RGB", (32, 32), "red").save(tmp_path / "animated.webp", save_all=True, lossless=True,
                                           append_images=[Image.new("RGB", (32, 32), "blue")])
    upright = Image.new("RGB", (32, 32))
    upright.paste("white", (0, 0, 32, 16))  # white above black, stored upside down
    turned = upright.transpose(Image.Transpose.ROTATE_180)
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    names = ["palette.png", "animated.webp", "turned.png", "turned.jpg"]
    images = decode(tmp_path, np.array(names, "S"), 32)
    assert (images[0] == 255).all() and (images[1] == torch.tensor([255, 0, 0])).all()
    assert np.array_equal(images[2].numpy(), np.asarray(upright)) and images[3].equal(images[2])
    assert all(read_image(tmp_path / name).permute(1, 2, 0).equal(image)
               for name, image in zip(names, images, strict=True))


RAMP = np.linspace(0, 1, 6)[None].repeat(2, 0)  # 0, 51, 102, 153, 204, 255 in 8 bits
REFUSED = "tells no scale"


@pytest.mark.parametrize("values, kind, ending, want", [
    (RAMP, np.float32, "tif", None),
    (255 * RAMP, np.float32, "tif", None),
    (255 * RAMP, np.int32, "tif", None),
    (4095 * RAMP, np.int32, "tif", None),
    *((top * RAMP, np.uint16, ending, None)
      for top in (255, 1023, 4095, 65535) for ending in ("png", "tif", "pgm")),
    (30000 * RAMP, np.uint16, "png", [0, 23, 46, 70, 93, 117]),
    (0 * RAMP, np.uint16, "png", [0] * 6),
    (9 * RAMP, np.uint16, "png", REFUSED),
    (9 * RAMP, np.float32, "tif", REFUSED),
    (70000 * RAMP, np.int32, "tif", REFUSED),
    (RAMP * 300 - 20, np.int32, "tif", REFUSED),
    (1000 * RAMP, np.float32, "tif", REFUSED),
    (RAMP - 0.5, np.float32, "tif", REFUSED),
    (np.where(RAMP == 1, np.inf, RAMP), np.float32, "tif", REFUSED),
    (RAMP * np.nan, np.float32, "tif", REFUSED),
])
def test_deep_gray_is_scaled_by_its_type_and_values(tmp_path, values, kind, ending, want):
    """In memory and streamed alike; what tells no scale is named."""
    Image.fromarray(values.astype(kind)).save(tmp_path / f"x.{ending}")
    if want == REFUSED:
        for read in (lambda: read_image(tmp_path / f"x.{ending}"),
                     lambda: decode(tmp_path, [f"x.{ending}"], 2)):
            with pytest.raises(ValueError, match=REFUSED):
                read()
        return
    pixels = read_image(tmp_path / f"x.{ending}")
    assert (pixels[:, 1].int() - torch.tensor(want or [0, 51, 102, 153, 204, 255])).abs().max() <= 1
    middle = tvf.to_pil_image(pixels).crop((2, 0, 4, 2))
    assert np.array_equal(decode(tmp_path, [f"x.{ending}"], 2)[0].numpy(), np.asarray(middle))


def chunk(kind, body, check=None):
    check = zlib.crc32(kind + body) if check is None else check
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def raw_png(depth, color, row, *chunks):
    """A PNG of one row, four pixels of gray (color 0) or two of RGB (2)."""
    header = struct.pack(">IIBBBBB", 2 if color else 4, 1, depth, color, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks,
             chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("depth, color, row, key, want", [
    (2, 0, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
    (4, 0, bytes([0x01, 0x5f]), (5,), [0, 17, 255, 255]),
    (16, 0, struct.pack(">4H", 0, 1000, 30000, 65535), (30000,), [0, 3, 255, 255]),
    (16, 2, struct.pack(">6H", 30000, 20000, 10000, 60000, 2, 3), (30000, 20000, 10000),
     [255, 234]),
])
def test_the_transparent_value_of_a_png_of_any_depth_is_white(
        tmp_path, depth, color, row, key, want):
    tRNS = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "x.png").write_bytes(raw_png(depth, color, row, tRNS))
    assert read_image(tmp_path / "x.png")[0, 0].tolist() == want


def test_color_of_16_bits_that_would_be_black_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(raw_png(16, 2, struct.pack(">6H", 4000, 2000, 1000, 1, 2, 3)))
    with pytest.raises(ValueError, match="upper 8 of its 16 bits end at 15"):
        read_image(tmp_path / "x.png")


def exif(orientation, *more):
    """EXIF with the orientation and more tags: (tag, type, bytes)."""
    tags = [(0x112, 3, struct.pack("<HH", orientation, 0)), *more]
    table, rest, at = struct.pack("<H", len(tags)), b"", 14 + 12 * len(tags)
    for tag, kind, value in tags:
        inside = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", at + len(rest))
        rest += value if len(value) > 4 else b""
        table += struct.pack("<HHI", tag, kind, 1) + inside
    return b"II*\0" + struct.pack("<I", 8) + table + bytes(4) + rest


ODD = exif(6,
           (0x11a, 10, bytes(8)),
           (0xc000, 12, struct.pack("<d", float("nan"))),
           (0xc001, 6, b"\xfd"))
LONG = zlib.compress(bytes(3 << 20))  # more than Pillow takes for a text


@pytest.mark.parametrize("where, parts, turned", [
    ("png", [chunk(b"eXIf", b"junk" * 5)], False),
    ("png", [chunk(b"eXIf", exif(6), check=1)], False),
    ("png", [chunk(b"eXIf", ODD)], True),
    ("png", [chunk(b"iCCP", b"k\0\0" + LONG), chunk(b"eXIf", ODD)], True),
    ("png", [chunk(b"iCCP", b"")], False),
    ("png", [chunk(b"zTXt", b"k\0\0" + LONG)], False),
    ("png", [chunk(b"tEXt", b"k\0v", check=1)], False),
    ("png", [chunk(b"gAMA", b"")], False),
    ("png", [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno hex")], False),
    ("png end", [chunk(b"zTXt", b"k\0\0" + LONG), chunk(b"eXIf", ODD)], True),
    ("jpg", [b"\xff\xe1", b"Exif\0\0" + ODD], True),
    ("jpg", [b"\xff\xe1", b"Exif\0\0junk"], False),
    ("jpg", [b"\xff\xe2", b"ICC_PROFILE\0"], False),
    ("jpg", [b"\xff\xee", b"Adobe"], False),
])
def test_metadata_is_not_taken_for_pixels(tmp_path, where, parts, turned):
    """Whatever it holds, the picture is read, upright if its orientation can be."""
    file, image = io.BytesIO(), Image.fromarray(
        np.arange(600, dtype=np.uint16).astype(np.uint8).reshape(10, 20, 3))
    image.save(file, "PNG" if "png" in where else "JPEG")
    want = read_pixels(file) if not turned else read_pixels(file).rot90(-1, (1, 2))
    plain, at = file.getvalue(), {"png": 33, "png end": -12, "jpg": 2}[where]
    if where == "jpg":
        parts.insert(1, struct.pack(">H", len(parts[1]) + 2))
    path = tmp_path / f"x.{where[:3]}"
    path.write_bytes(plain[:at] + b"".join(parts) + plain[at:])
    assert read_image(path).equal(want)
    assert np.array_equal(decode(tmp_path, [path.name], 10)[0],
                          images_module.fit(tvf.to_pil_image(want), 10))
    assert read_image(path, upright=False).equal(read_pixels(file))
    cut_short(path, len(plain) // 2)  # broken pixels are an error still
    with pytest.raises((OSError, SyntaxError, ValueError)):
        read_image(path)


def read_pixels(file):
    return tvf.pil_to_tensor(Image.open(file))


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (20, 10)])
def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path, size):
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)  # along the longer side
    ramp = np.broadcast_to(ramp if size[0] > size[1] else ramp[:, None], (size[1], size[0]))
    image = Image.fromarray(ramp.copy())
    image.save(tmp_path / "ramp.png")
    decoded = decode(tmp_path, np.array(["ramp.png"], "S"), 16)[0].int()
    scale = 16 / min(size)
    want = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    want = tvf.pil_to_tensor(tvf.center_crop(want, 16)).permute(1, 2, 0).int()
    assert decoded.shape == (16, 16, 3) and (decoded - want).abs().max() <= 8


def cut_short(file, left=2000):
    file.write_bytes(file.read_bytes()[:left])


@pytest.mark.parametrize("spoil, words", [  # words: {} is the folder
    (lambda root: shutil.rmtree(root), ["no folder {} that", "{}/train/CLASS"]),
    (lambda root: (shutil.rmtree(root / "train"), (root / "train").mkdir()),
     ["{}/train has no class folders"]),
    (lambda root: shutil.rmtree(root / "test"), ["no folder {}/test", "--validation-fraction 0.1"]),
    (lambda root: shutil.rmtree(root / "train/dog"), ["one class only (cat)"]),
    (lambda root: (root / "test/dog").rename(root / "test/cow"),
     ["only in {}/train: dog; only in {}/test: cow"]),
    (lambda root: [file.rename(f"{file}.txt") for file in (root / "train/dog").iterdir()],
     ["in class dog"]),
    (lambda root: os.mkfifo(root / "test/dog/3.png"),
     ["{}/test/dog/3.png is no file (a FIFO"]),  # open() would wait
    (lambda root: cut_short(root / "test/dog/1.png"), ["cannot read image {}/test/dog/1.png ("])])
def test_folder_errors_say_where_and_how(tmp_path, spoil, words):
    root = write_folder(tmp_path / "root")
    spoil(root)
    error = message("folder", root)
    assert [word for word in words if word.replace("{}", str(root)) not in error] == [], error


def test_folder_that_cannot_be_split_opened_or_listed(tmp_path, monkeypatch):
    root = write_folder(tmp_path, splits=("train",), count=1)
    told = message("folder", root, validation_fraction=0.5)
    assert "one image alone cannot be split, class cat, dog" in told
    write_folder(root, splits=("test",))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "0.png" in message("folder", root) and "decompression bomb" in message("folder", root)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    assert f'cannot list {root / "train"}: [Errno 13] Permission denied' in message("folder", root)


def test_folder_names_what_it_leaves_out(tmp_path):
    """The images and their order are those of torchvision's ImageFolder."""
    root = write_folder(tmp_path / "root")
    cat = root / "train" / "cat"
    (cat / "deep" / "er").mkdir(parents=True)
    for old, new in (("0.png", "deep/er/0.png"), ("1.png", "deep/z.png"), ("2.png", "dee.PNG")):
        (cat / old).rename(cat / new)
    usual = [(os.path.relpath(path, root), c) for path, c in ImageFolder(root / "train").samples]
    for path in (cat / "a.txt", cat / "b.txt", root / "train" / "readme", cat / ".hidden.png"):
        path.write_text("not an image")
    write_folder(root / "train", splits=(".checkpoints",))
    loaded = data.load("folder", root, stream=True)
    assert loaded.classes == ["cat", "dog"]
    assert list(zip(loaded.train_files.astype(str), loaded.train_labels.tolist(),
                    strict=True)) == usual
    [note] = loaded.notes
    assert f'{root / "train"}: 3 files or links skipped' in note and f'{cat / "a.txt"}, ' in note


def test_links(tmp_path):
    """To a class and to images they are followed, to a folder inside a class counted;
    upward none hangs."""
    root, elsewhere = (tmp_path / "root",
                       write_folder(tmp_path / "elsewhere", splits=("all",)) / "all")
    (root / "train" / "dog").mkdir(parents=True)
    (root / "train" / "cat").symlink_to(elsewhere / "cat")
    for file in (elsewhere / "dog").iterdir():
        (root / "train" / "dog" / file.name).symlink_to(file)
    (root / "test").symlink_to(root / "train")

    def files(**more):
        loaded, found = data.load("folder", root, stream=True), dict(**more, cat="", dog="")
        assert (loaded.classes == list(found)
                and loaded.train_labels.bincount().tolist() == [3] * len(found))
        want = itertools.product(found.items(), range(3))
        want = [f"train/{name}/{deep}{i}.png" for (name, deep), i in want]
        assert loaded.train_files.astype(str).tolist() == want
        return loaded

    assert files().notes == []
    (elsewhere / "cat" / "dogs").symlink_to(elsewhere / "dog")
    (elsewhere / "cat" / "up").symlink_to(root)
    (root / "train" / "dog" / "self").symlink_to(root / "train" / "dog")
    skipped = ", ".join(str(root / "train" / name) for name in ("cat/dogs", "cat/up", "dog/self"))
    assert files().notes[0] == (f'{root / "train"}: 3 files or links skipped, '
                                f'not images of a class: {skipped}')
    (root / "train" / "all").symlink_to(root)  # a class, of what lies below and is no link
    files(all="train/dog/")


@pytest.mark.parametrize("name, options, words", [
    ("mnist", {}, ("mnist", "cifar100")), ("cifar10", {"image_size": 64}, ("32 pixels, not 64",)),
    ("synthetic", {"stream": True}, ("leave --stream out",)),
    ("synthetic", {"augment": "flip"}, ("flip", "crop-flip")),
    ("synthetic", {"validation_fraction": 1}, ("less than 1",))])
def test_wrong_options(name, options, words):
    assert all(word in message(name, "data", **options) for word in words)
    assert str(UserError("two\nlines")) == "two lines"


# ---------------------------------------------------------------- streaming

def test_stream_gives_the_same_bits_with_any_workers_from_any_step(stream):
    state = torch.get_rng_state()
    whole = list(stream.train_batches(20, seed=1, epoch=2))
    assert len(whole) == 3 and columns(whole)[2].sort().values.equal(torch.arange(60))
    for images, labels, index in whole:
        assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.equal(stream.train_labels[index]) and labels[::2].equal(labels[1::2])
    for workers in (0, 2):
        other = replace(stream, workers=workers)
        assert equal(other.train_batches(20, seed=1, epoch=2), whole)
        assert equal(other.train_batches(20, seed=1, epoch=2, start=1), whole[1:])
    assert torch.get_rng_state().equal(state)


def test_stream_crops_are_a_function_of_the_image(stream):
    """The same image in another batch has the same crop;
    without its flip it is the mirror image."""
    def by_index(dataset, batch_size, pairs, seed=1, epoch=2):
        images, _, index = columns(dataset.train_batches(batch_size, seed, epoch, pairs=pairs))
        return images[index.argsort()]

    pairs, crop = (by_index(stream, 20, True),
                   by_index(replace(stream, augmentation="crop"), 20, True))
    assert pairs.equal(by_index(stream, 30, False))
    for seed, epoch in ((1, 3), (2, 2)):
        assert (by_index(stream, 20, True, seed, epoch) != pairs).flatten(1).any(1).all()
    flipped = (pairs != crop).flatten(1).any(1)
    assert 15 < flipped.sum() < 45 and pairs[flipped].equal(crop[flipped].flip(-1))


def test_stream_views_are_those_of_torchvision(stream):
    def close(got, want):  # v2's arithmetic in uint8 rounds otherwise than float32
        got = got * stream.mean_std[1][:, None, None] + stream.mean_std[0][:, None, None]
        return (255 * got - want).abs().max() < 1.01

    image = read_image(os.path.join(stream.data_dir, "test", "cat", "0.jpg"))
    assert image.equal(tvf.pil_to_tensor(
        Image.open(os.path.join(stream.data_dir, "test", "cat", "0.jpg"))))
    # 37 = round(32 * 256 / 224)
    centre = tvf.center_crop(tvf.resize(image, [37], antialias=True), [32, 32])
    assert stream.resize == 37 and close(next(stream.test_batches())[0][0], centre)
    images, _, index = next(replace(stream, augmentation="none").train_batches(20, 0, 0))
    again = torch.cat([
        batch[0] for batch in replace(stream, test_files=stream.train_files).test_batches()])
    assert images.equal(again[index])


@pytest.mark.parametrize("size", [(20, 331), (331, 20), (3, 3000), (1, 20000), (20001, 1)])
def test_a_long_picture_is_cut_before_it_is_resized(size):
    """The middle is that of the whole one resized; the memory is that of an ordinary picture."""
    image = torch.randint(256, (3, *size), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    view, seen = CentreView(8, 6), []
    usual = view.transform
    view.transform = lambda image: seen.append(image.shape) or usual(image)
    assert (view(image).int() - usual(image).int()).abs().max() <= 2
    assert max(seen[0]) <= 16 * min(size) + 1


H, W = 60, 80
Y, X = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
COORDINATES = torch.stack([Y, X, torch.zeros(H, W)])


def boxes(key, flip=True, count=2000):
    """What views of COORDINATES show:
    top, left, height, width, int64 [n, 4]; whether flipped, bool [n]."""
    view = RandomView(8, flip)
    views = torch.stack([view(COORDINATES, f"{key},{i}") for i in range(count)])  # [n, 3, 8, 8]
    y, x = views[:, 0, :, 0], views[:, 1, 0]  # [n, 8] each
    flipped = x[:, 0] > x[:, -1]
    # 0 and 7: cut filters
    size = torch.stack([(c[:, 6] - c[:, 1]).abs() / 5 * 8 for c in (y, x)], 1).round()
    corner = torch.stack([c.mean(1) + 0.5 for c in (y, x)], 1) - size / 2
    assert (corner - corner.round()).abs().max() < 0.1
    return torch.cat([corner.round(), size], 1).long(), flipped


def test_random_views_are_those_of_random_resized_crop():
    torch.manual_seed(0)
    limits = torch.empty(3, H, W), (0.08, 1), (3 / 4, 4 / 3)
    (mine, flipped), theirs = boxes("key"), [
        RandomResizedCrop.get_params(*limits) for _ in range(2000)]
    mine, theirs = mine.double(), torch.tensor(theirs).double()
    for statistic in (lambda box: box, lambda box: box[:, 2] * box[:, 3],
                      lambda box: (box[:, 3] / box[:, 2]).log()):
        a, b = statistic(mine), statistic(theirs)
        assert ((a.mean(0) - b.mean(0)).abs() < 0.13 * b.std(0)).all()  # 4 standard errors
        assert ((a.std(0) / b.std(0)).log().abs() < 0.1).all()
    assert (mine >= 0).all() and (mine[:, :2] + mine[:, 2:] <= torch.tensor([H, W])).all()
    assert 900 < flipped.sum() < 1100


def test_a_random_view_is_a_function_of_its_key_and_number():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    (first, flipped), (plain, never) = boxes("0,1", count=100), boxes("0,1", flip=False, count=100)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(4)
    again, other = boxes("0,1", count=100), boxes("0,2", count=100)
    assert first.equal(again[0]) and flipped.equal(again[1])
    # two numbers, two keys
    assert len(first.unique(dim=0)) == 100 and not (first == other[0]).all(1).any()
    assert not flipped.equal(other[1])
    assert first.equal(plain) and not never.any()


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_names_a_broken_file_in_one_line(tmp_path, workers):
    write_folder(tmp_path, size=(90, 90), ending="jpg")
    loaded = data.load("folder", tmp_path, stream=True, workers=workers)
    broken = tmp_path / "train" / "dog" / "1.jpg"
    cut_short(broken)
    with pytest.raises(ImageError) as caught:
        list(loaded.train_batches(2, 0, 0))
    assert f"cannot read image {broken} (" in str(caught.value) and "\n" not in str(caught.value)


def test_imagenet_has_its_own_size_statistics_and_folders(tmp_path):
    write_folder(tmp_path, splits=("train", "val"), count=2)
    (tmp_path / "test").mkdir()  # of images without labels
    loaded = data.load("imagenet", tmp_path)
    assert (loaded.image_size, loaded.resize, loaded.name) == (224, 256, "imagenet")
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    assert len(loaded.test_labels) == 4 and next(loaded.test_batches())[0].shape == (4, 3, 224, 224)


def fail(error):
    with naming("x.png") if isinstance(error, MemoryError) else nullcontext():
        raise error


def test_errors_in_workers_are_not_called_broken_images():
    before = multiprocessing.active_children()
    for error in (RuntimeError("shapes differ"), MemoryError()):
        with pytest.raises(type(error)):
            list(Reader(fail, 1)([[error]]))
        assert multiprocessing.active_children() == before


@pytest.mark.parametrize("method,stay", [("fork", False), ("spawn", True)])
def test_workers_stay_where_their_start_takes_long(method, stay, stream, monkeypatch):
    """The batches are those of this process, behind an epoch that was left in its middle too."""
    monkeypatch.setattr("support.images.get_start_method", lambda: method)
    before, worked, alone = (set(multiprocessing.active_children()),
                             replace(stream, workers=2), replace(stream, workers=0))
    workers = []
    for epoch in range(4):
        batches = worked.train_batches(4, 0, epoch)
        if epoch == 2:
            next(batches)
            batches.close()
        else:
            # asks for no more than the last, as train.py
            for theirs in alone.train_batches(4, 0, epoch):
                assert all(a.equal(b) for a, b in zip(next(batches), theirs, strict=True))
        workers.append({child.pid for child in set(multiprocessing.active_children()) - before})
    assert [len(w) for w in workers] == [2, 2, 0, 2]
    assert (workers[0] == workers[1]) is stay
    assert not stay or pickle.loads(pickle.dumps(worked.readers["train"])).kept is None
    worked.readers.clear()
    del batches
    assert set(multiprocessing.active_children()) == before


def test_workers_leave_signals_to_the_program_and_a_killed_one_is_one_line(stream, monkeypatch):
    poll = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(poll, "__defaults__", (0.1,))  # seconds, 5 otherwise
    before, batches = (multiprocessing.active_children(),
                       replace(stream, workers=1).train_batches(2, 0, 0))
    next(batches)
    [worker] = set(multiprocessing.active_children()) - set(before)
    # what is sent to the program's group does not reach it
    assert os.getpgid(worker.pid) == worker.pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        for _ in range(2):  # and what is sent to it, too, ends it no sooner than the step
            os.kill(worker.pid, number)
            next(batches)
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.01)  # nothing is raised here, in the middle of a step
    with pytest.raises(
            ImageError, match="a process that reads images has ended .*--workers") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- CIFAR

class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["cifar100", "cifar10"])
def stand_in(request, tmp_path, monkeypatch):
    """A small archive of the real layout and its MD5 sums, for torchvision's class;
    it stands in for the server."""
    cifar = data.CIFAR[request.param][0]
    key = "fine_labels" if request.param == "cifar100" else "labels"
    source = tmp_path / "source" / cifar.base_folder
    source.mkdir(parents=True)
    pixels, sums = {}, {}
    for i, (name, _) in enumerate(
            cifar.train_list + cifar.test_list + [[cifar.meta["filename"], ""]]):
        pixels[name] = np.random.default_rng(i).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": pixels[name], key: [0, 1, 2, 2, 1, 0],
                   cifar.meta["key"]: ["apple", "bear", "cup"]}
        (source / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((source / name).read_bytes()).hexdigest()
    archive = tmp_path / "source" / cifar.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, cifar.base_folder)

    def serve(request):
        if not archive.exists():
            raise URLError("Name or service not known")
        print("progress")  # as older torchvisions do
        response = io.BytesIO(archive.read_bytes())
        response.url, response.length = request.full_url, archive.stat().st_size
        return response

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, split, [[name, sums[name]] for name, _ in getattr(cifar, split)])
    monkeypatch.setattr(cifar, "meta", dict(cifar.meta, md5=sums[cifar.meta["filename"]]))
    return request.param, cifar, archive, pixels


def test_cifar_is_fetched_checked_and_unpacked(stand_in, tmp_path, capsys):
    name, cifar, archive, pixels = stand_in
    loaded = data.load(name, tmp_path / "new" / "data")
    for images, labels, files in ((loaded.train_images, loaded.train_labels, cifar.train_list),
                                  (loaded.test_images, loaded.test_labels, cifar.test_list)):
        want = np.concatenate([pixels[file] for file, _ in files])
        want = want.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert (images.dtype == torch.uint8 and images.is_contiguous()
                and np.array_equal(images.numpy(), want))
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2, 2, 1, 0] * len(files)
    assert loaded.classes == ["apple", "bear", "cup"]
    archive.unlink()
    split = data.load(name, tmp_path / "new" / "data", validation_fraction=0.5)  # now from the disk
    assert capsys.readouterr().out == ""
    assert split.mean[0] == loaded.mean[0] == {"cifar100": 0.5071, "cifar10": 0.4914}[name]


def test_cifar_is_not_fetched_twice_at_once(stand_in, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    name, cifar, *_ = stand_in
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, tmp_path / ".download.lock"]
    other = lambda: subprocess.run(command, capture_output=True).returncode
    during, real = [], cifar.download
    monkeypatch.setattr(cifar, "download", lambda self: during.append(other()) or real(self))
    data.load(name, tmp_path)
    assert during and all(during) and other() == 0


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_cifar_never_unpickles_a_changed_file(stand_in, tmp_path, which):
    name, cifar, archive, _ = stand_in
    data.load(name, tmp_path)
    changed = cifar.meta["filename"] if which == "meta" else getattr(cifar, f"{which}_list")[-1][0]
    (tmp_path / cifar.base_folder / changed).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (tmp_path / cifar.filename).unlink()  # or it would be unpacked again
    archive.unlink()
    assert f"--dataset {name}" in message(name, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_cifar_never_unpacks_a_changed_archive(stand_in, tmp_path):
    name, cifar, archive, _ = stand_in
    archive.write_bytes(archive.read_bytes()[:-1])
    assert "wrong MD5); delete" in message(name, tmp_path)
    assert not (tmp_path / cifar.base_folder).exists()
    archive.unlink()  # no network, half a file there
    (tmp_path / cifar.filename).write_bytes(b"half of it")
    assert f"{tmp_path / cifar.filename} found there is damaged" in message(name, tmp_path)


WAYS_OUT = ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "{}/cifar-100-python.tar.gz",
            "--dataset folder --data-dir DIR",
            "--dataset synthetic"]


@pytest.mark.parametrize("where, error, words", [
    (urllib.request, URLError("Name or service not known"),
     ["Name or service not known", *WAYS_OUT]),
    (urllib.request, TimeoutError("timed out"), ["timed out", *WAYS_OUT]),
    (data.datasets.cifar, OSError(28, "No space left on device"),
     ["--data-dir {}", "No space left on device"])])
def test_cifar_without_network_or_disk_names_the_ways_out(
        tmp_path, monkeypatch, where, error, words):
    timeouts = []

    def fail(*args, **kwargs):
        timeouts.append(data.socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(
        where, "urlopen" if where is urllib.request else "download_and_extract_archive", fail)
    told = message("cifar100", tmp_path)
    assert [word for word in words if word.replace("{}", str(tmp_path)) not in told] == [], told
    assert (all(0 < t <= 20 for t in timeouts) and timeouts
            and data.socket.getdefaulttimeout() is None)
    (tmp_path / "file").write_text("")
    assert f'--data-dir {tmp_path / "file"}: cannot hold' in message("cifar100", tmp_path / "file")
