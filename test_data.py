"""Tests of data.py: `pytest test_data.py`, under 20 s on two cores, no network and no GPU needed."""

import hashlib
import io
import pickle
import tarfile
import urllib.request
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image

import data
from data import DataError, augment, epoch_plan, normalise


@pytest.fixture(scope="module")
def synthetic():
    return data.load("synthetic")


# ---------------------------------------------------------------- batches

EQUAL_100 = torch.arange(5000) % 100
EQUAL_10 = torch.arange(1000) % 10
UNEQUAL = torch.repeat_interleave(torch.arange(7), torch.tensor([1, 2, 33, 400, 7, 0, 58]))  # n = 501: one stays alone
SINGLES = torch.arange(40)


@pytest.mark.parametrize("labels, batch_size", [(EQUAL_100, 128), (EQUAL_10, 64), (UNEQUAL, 16), (UNEQUAL[1:], 16),
                                                (UNEQUAL, 500), (SINGLES, 8), (torch.zeros(3, dtype=torch.int64), 2)])
def test_plan_shows_every_image_once_in_spread_pairs(labels, batch_size):
    n, steps = len(labels), len(labels) // batch_size
    plan = epoch_plan(labels, batch_size, pad=4, seed=1, epoch=2)
    assert len(plan) == steps
    assert torch.cat([b.index for b in plan]).sort().values.equal(torch.arange(n))
    sizes = [len(b.index) for b in plan]
    assert max(sizes) - min(sizes) <= 2

    pairs_of = labels.bincount() // 2
    same = Counter()
    for batch in plan:
        assert len(batch.index) == len(batch.top) == len(batch.left) == len(batch.flip)
        pairs = labels[batch.index[:len(batch.index) // 2 * 2]].view(-1, 2)  # without an image that stays alone
        dealt = pairs[pairs[:, 0] == pairs[:, 1], 0].bincount(minlength=len(pairs_of))
        assert (dealt <= -(-pairs_of // steps)).all()
        same.update(dict(enumerate(dealt.tolist())))
    assert sum(size % 2 for size in sizes) == n % 2
    assert [same[c] for c in range(len(pairs_of))] == pairs_of.tolist()  # every pair that a class can make


def test_plan_of_cifar100():
    labels = torch.arange(50_000) % 100
    plan = epoch_plan(labels, 128, pad=4, seed=0, epoch=0)
    assert Counter(len(b.index) for b in plan) == {128: 350, 130: 40}
    assert all(len(labels[b.index].unique()) == len(b.index) // 2 for b in plan)  # all pairs differ in class


def test_plan_is_a_function_of_seed_and_epoch():
    def flat(seed, epoch):
        return [torch.cat(column) for column in zip(*epoch_plan(EQUAL_100, 128, 4, seed, epoch))]

    state = torch.get_rng_state()
    first = flat(0, 1)
    torch.manual_seed(99)
    assert all(a.equal(b) for a, b in zip(first, flat(0, 1)))
    assert not any(a.equal(b) for a, b in zip(first, flat(0, 2)))
    assert not any(a.equal(b) for a, b in zip(first, flat(1, 0)))
    assert not any(a.equal(b) for a, b in zip(first, flat(1, 1)))
    torch.set_rng_state(state)
    flat(0, 1)
    assert torch.get_rng_state().equal(state)


def test_plan_is_shuffled():
    first, second = (epoch_plan(EQUAL_100, 128, 4, 0, epoch) for epoch in (0, 1))

    def partners(plan):
        return {tuple(sorted(pair)) for b in plan for pair in b.index.view(-1, 2).tolist()}

    assert len(partners(first) & partners(second)) < 0.1 * len(EQUAL_100) / 2  # 1 / 49 expected
    classes = torch.cat([EQUAL_100[b.index] for b in first])
    assert abs(torch.corrcoef(torch.stack([classes.double(), torch.arange(5000.)]))[0, 1]) < 0.1
    large = [len(b.index) > 128 for plan in (first, second) for b in plan]
    assert len(set(map(tuple, (large[:39], large[39:])))) == 2  # the large batches are at other places


def test_plan_draws_offsets_and_flips_evenly():
    plan = epoch_plan(EQUAL_100, 128, pad=4, seed=3, epoch=0)
    for offsets in (torch.cat([b.top for b in plan]), torch.cat([b.left for b in plan])):
        assert offsets.dtype == torch.int64
        assert (offsets.bincount(minlength=9) - 5000 / 9).abs().max() < 100 and offsets.max() == 8
    assert not plan[0].top.equal(plan[0].left)
    flip = torch.cat([b.flip for b in plan])
    assert flip.dtype == torch.bool and 2300 < flip.sum() < 2700


@pytest.mark.parametrize("batch_size", [0, -2, 1, 7, 42])
def test_plan_refuses_batch_sizes(batch_size):
    with pytest.raises(ValueError, match="batch size"):
        epoch_plan(SINGLES, batch_size, 4, 0, 0)


@pytest.mark.parametrize("height, width, pad", [(32, 32, 4), (9, 7, 1), (8, 8, 0)])
def test_augment_crops_as_torchvision_does(height, width, pad):
    images = torch.randint(1, 256, (50, height, width, 3), dtype=torch.uint8)
    for batch in epoch_plan(torch.arange(50) % 5, 20, pad, seed=0, epoch=0):
        crops = augment(images, batch, pad)
        assert crops.dtype == torch.uint8
        for i, top, left, flip, crop in zip(*batch, crops):
            want = tvf.crop(tvf.pad(images[i].permute(2, 0, 1), pad), top, left, height, width)
            want = tvf.hflip(want) if flip else want
            assert crop.permute(2, 0, 1).equal(want)


def test_normalise():
    images = torch.randint(0, 256, (5, 8, 6, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    out = normalise(images, mean, std)
    want = (images.permute(0, 3, 1, 2).double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_train_batches_and_their_tail(synthetic):
    small = synthetic._replace(train_images=synthetic.train_images[:600], train_labels=synthetic.train_labels[:600])
    batches = list(data.train_batches(small, 100, seed=5, epoch=3))
    tail = list(data.train_batches(small, 100, seed=5, epoch=3, start=4))
    assert len(batches) == 6 and len(tail) == 2
    for (images, labels), (tail_images, tail_labels) in zip(batches[4:], tail):
        assert images.equal(tail_images) and labels.equal(tail_labels)
    plan = epoch_plan(small.train_labels, 100, 4, 5, 3)  # pad: an eighth of 32
    mean, std = torch.tensor(small.mean), torch.tensor(small.std)
    for (images, labels), batch in zip(batches, plan, strict=True):
        assert images.equal(normalise(augment(small.train_images, batch, 4), mean, std))
        assert labels.equal(small.train_labels[batch.index])


def test_test_batches_show_all_in_order(synthetic):
    small = synthetic._replace(test_images=synthetic.test_images[:130], test_labels=synthetic.test_labels[:130])
    images, labels = (torch.cat(parts) for parts in zip(*data.test_batches(small, batch_size=50)))
    assert labels.equal(small.test_labels)
    assert images.equal(normalise(small.test_images, torch.tensor(small.mean), torch.tensor(small.std)))


def test_dataset_moves_to_a_device(synthetic):
    moved = synthetic.to("meta")
    assert [t.device.type for t in moved[1:5]] == ["meta"] * 4 and moved[5:] == synthetic[5:]


# ---------------------------------------------------------------- synthetic

def test_synthetic(synthetic):
    assert synthetic.train_images.shape == (10_000, 32, 32, 3) and synthetic.test_images.shape == (2_000, 32, 32, 3)
    assert synthetic.train_images.dtype == torch.uint8 and synthetic.train_labels.dtype == torch.int64
    assert synthetic.train_labels.bincount().tolist() == [500] * 20
    assert synthetic.test_labels.bincount().tolist() == [100] * 20
    assert len(set(synthetic.classes)) == 20 and "striped disc" in synthetic.classes
    every = torch.cat([synthetic.train_images, synthetic.test_images])
    assert len({image.numpy().tobytes() for image in every}) == 12_000  # no image twice, in either split
    pixels = synthetic.train_images.double().flatten(0, 2) / 255
    torch.testing.assert_close(torch.tensor(synthetic.mean).double(), pixels.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(synthetic.std).double(), pixels.std(0, correction=0), rtol=1e-6, atol=1e-6)


def test_synthetic_ignores_and_keeps_the_global_generator(synthetic):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = data.load("synthetic")
    assert torch.get_rng_state().equal(state)
    assert again.train_images.equal(synthetic.train_images) and again.test_images.equal(synthetic.test_images)


def test_synthetic_image_size():
    draw = [data._draw(torch.arange(20), size, torch.Generator().manual_seed(0)) for size in (48, 24)]
    assert [tuple(images.shape) for images in draw] == [(20, 48, 48, 3), (20, 24, 24, 3)]


def test_synthetic_classes_cannot_be_told_by_colour(synthetic):
    """Linear and nearest-mean classifiers on each image's mean colour stay near the chance of 5%."""
    train, test = (i.double().flatten(1, 2).mean(1) / 255 for i in (synthetic.train_images, synthetic.test_images))
    labels, truth = synthetic.train_labels, synthetic.test_labels
    centres = torch.stack([train[labels == c].mean(0) for c in range(20)])
    assert (torch.cdist(test, centres).argmin(1) == truth).double().mean() < 0.065
    one = [torch.cat([x, torch.ones(len(x), 1)], 1) for x in (train, test)]
    weights = torch.linalg.lstsq(one[0], torch.nn.functional.one_hot(labels).double()).solution
    assert ((one[1] @ weights).argmax(1) == truth).double().mean() < 0.065


# ---------------------------------------------------------------- a folder of images

def write_folder(root, splits=("train", "test"), classes=("cat", "dog"), size=(32, 32), count=3):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_folder(tmp_path):
    write_folder(tmp_path, splits=("train", "val"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    loaded = data.load("folder", str(tmp_path))
    assert loaded.classes == ["cat", "dog"]
    assert loaded.train_labels.tolist() == loaded.test_labels.tolist() == [0] * 3 + [1] * 3
    want = np.stack([np.asarray(Image.open(tmp_path / "train" / "dog" / f"{i}.png")) for i in range(3)])
    assert np.array_equal(loaded.train_images[3:].numpy(), want)
    pixels = loaded.train_images.double().flatten(0, 2) / 255
    torch.testing.assert_close(torch.tensor(loaded.mean), pixels.mean(0).float())
    torch.testing.assert_close(torch.tensor(loaded.std), pixels.std(0, correction=0).float())


def test_folder_prefers_test_to_val(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, splits=("val",), count=1)
    assert len(data.load("folder", tmp_path).test_images) == 6


def red(mode):
    """A red 32 x 32 image in `mode`, gray 80 where the mode has no colour, and what it must decode to."""
    plain = Image.new("RGB", (32, 32), (200, 20, 20))
    if mode == "RGBA":  # half transparent: half way to white
        plain.putalpha(Image.new("L", (32, 32), 51))
        return plain, (244, 208, 208)
    if mode == "P":
        return plain.quantize(4), (200, 20, 20)
    if mode in ("L", "LA"):
        return Image.new("L", (32, 32), 80).convert(mode), (80, 80, 80)
    if mode == "1":
        return Image.new("1", (32, 32), 1), (255, 255, 255)
    if mode == "I;16":
        return Image.fromarray(np.full((32, 32), 80 * 257, np.uint16)), (80, 80, 80)
    return plain.convert(mode), (200, 20, 20)


@pytest.mark.parametrize("mode, ending", [
    ("RGB", "png"), ("RGB", "webp"), ("L", "png"), ("LA", "png"), ("1", "png"), ("P", "png"), ("RGBA", "png"),
    ("CMYK", "tif"), ("I;16", "png"), ("I;16", "tif"), ("I;16", "pgm")])
def test_folder_takes_every_kind_of_image(tmp_path, mode, ending):
    image, want = red(mode)
    image.save(tmp_path / f"image.{ending}", **({"lossless": True} if ending == "webp" else {}))
    decoded = data._decode([(str(tmp_path / f"image.{ending}"), 0)], 32)
    assert decoded.shape == (1, 32, 32, 3)
    assert (decoded.int() - torch.tensor(want)).abs().max() <= 1


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
    files = [(str(tmp_path / name), 0) for name in ("palette.png", "animated.webp", "turned.png")]
    images = data._decode(files, 32)
    assert (images[0] == 255).all()
    assert (images[1] == torch.tensor([255, 0, 0])).all()
    assert np.array_equal(images[2].numpy(), np.asarray(upright))


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (20, 10)])
def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path, size):
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)  # along the longer side
    ramp = np.broadcast_to(ramp if size[0] > size[1] else ramp[:, None], (size[1], size[0]))
    image = Image.fromarray(ramp.copy())
    image.save(tmp_path / "ramp.png")
    decoded = data._decode([(str(tmp_path / "ramp.png"), 0)], 16)[0].int()
    scale = 16 / min(size)
    want = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    want = tvf.pil_to_tensor(tvf.center_crop(want, 16)).permute(1, 2, 0).int()
    assert decoded.shape == (16, 16, 3) and (decoded - want).abs().max() <= 8


def test_folder_errors_say_where_and_how(tmp_path):
    def message():
        with pytest.raises(DataError) as caught:
            data.load("folder", root)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    root = tmp_path / "data"
    assert f"no folder {root} that" in message() and "train/CLASS" in message()
    root.mkdir()
    assert "no folder" in message() and str(root / "train") in message()
    (root / "train").mkdir()
    assert "test or val" in message()
    (root / "test").mkdir()
    assert f'{root / "train"} has no class folders' in message()
    write_folder(root / "one", classes=("cat",))
    root = root / "one"
    assert "one class only (cat)" in message()
    root = write_folder(tmp_path / "differ")
    (root / "test" / "dog").rename(root / "test" / "cow")
    assert f'only in {root / "train"}: dog' in message() and f'only in {root / "test"}: cow' in message()
    root = write_folder(tmp_path / "empty")
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert "in class dog" in message()
    root = write_folder(tmp_path / "truncated", size=(64, 64))
    file = root / "test" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:2000])
    assert str(file) in message()
    file.write_bytes(b"")
    assert str(file) in message()
    root = tmp_path / "a file"
    root.write_text("")
    assert "no folder" in message()


def test_folder_without_permission(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_folder(tmp_path)
    monkeypatch.setattr(data, "find_classes", denied)
    with pytest.raises(DataError, match=f'{tmp_path / "train"}.*Permission denied'):
        data.load("folder", tmp_path)


def test_folder_with_a_decompression_bomb(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="0.png.*decompression bomb"):
        data.load("folder", tmp_path)


def test_unknown_data_set():
    with pytest.raises(DataError, match="mnist.*cifar100"):
        data.load("mnist")
    assert str(DataError("two\nlines")) == "two lines"


# ---------------------------------------------------------------- CIFAR

class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["cifar100", "cifar10"])
def stand_in(request, tmp_path, monkeypatch):
    """A small archive of the real layout, and its MD5 sums, for torchvision's own class; a stand-in for the server."""
    cifar = data.CIFAR[request.param][0]
    key = "fine_labels" if request.param == "cifar100" else "labels"
    source = tmp_path / "source" / cifar.base_folder
    source.mkdir(parents=True)
    pixels, sums = {}, {}
    for i, (name, _) in enumerate(cifar.train_list + cifar.test_list + [[cifar.meta["filename"], ""]]):
        pixels[name] = np.random.default_rng(i).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": pixels[name], key: [0, 1, 2, 2, 1, 0], cifar.meta["key"]: ["apple", "bear", "cup"]}
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
        want = np.concatenate([pixels[file].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for file, _ in files])
        assert images.dtype == torch.uint8 and images.is_contiguous() and np.array_equal(images.numpy(), want)
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2, 2, 1, 0] * len(files)
    assert loaded.classes == ["apple", "bear", "cup"]
    assert loaded.mean[0] == {"cifar100": 0.5071, "cifar10": 0.4914}[name]
    archive.unlink()
    data.load(name, tmp_path / "new" / "data")  # the second time from the disk
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_cifar_never_unpickles_a_changed_file(stand_in, tmp_path, which):
    name, cifar, archive, _ = stand_in
    data.load(name, tmp_path)
    changed = cifar.meta["filename"] if which == "meta" else getattr(cifar, f"{which}_list")[-1][0]
    (tmp_path / cifar.base_folder / changed).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (tmp_path / cifar.filename).unlink()  # or it would be unpacked again
    archive.unlink()
    with pytest.raises(DataError, match=f"--dataset {name}"):
        data.load(name, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_cifar_never_unpacks_a_changed_archive(stand_in, tmp_path):
    name, cifar, archive, _ = stand_in
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"wrong MD5.*delete"):
        data.load(name, tmp_path)
    assert not (tmp_path / cifar.base_folder).exists()


def test_cifar_names_a_damaged_archive_when_there_is_no_network(stand_in, tmp_path):
    name, cifar, archive, _ = stand_in
    archive.unlink()
    (tmp_path / cifar.filename).write_bytes(b"half of it")
    with pytest.raises(DataError, match=f"{tmp_path / cifar.filename} found there is damaged"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("error", [URLError("Name or service not known"), TimeoutError("timed out"),
                                   ConnectionResetError("reset")])
def test_cifar_without_network_names_the_ways_out(tmp_path, monkeypatch, error):
    timeouts = []

    def fail(*args, **kwargs):
        timeouts.append(data.socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(DataError) as caught:
        data.load("cifar100", tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(error.args[0]) in message
    for part in ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", str(tmp_path / "cifar-100-python.tar.gz"),
                 "--dataset folder --data-dir DIR", "--dataset synthetic"):
        assert part in message
    assert all(0 < t <= 20 for t in timeouts) and timeouts and data.socket.getdefaulttimeout() is None


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_cifar_on_a_disk_that_refuses(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(data.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=f"--data-dir {tmp_path}.*{error.strerror}"):
        data.load("cifar100", tmp_path)


def test_cifar_where_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f'--data-dir {tmp_path / "file"}'):
        data.load("cifar100", tmp_path / "file")


def test_cifar_has_one_size():
    with pytest.raises(DataError, match="32 pixels, not 64"):
        data.load("cifar10", image_size=64)
