"""Transfer a student to detection and instance segmentation: its backbone under FPN and Mask R-CNN, then COCO's AP.

    pip install pycocotools                                 # the reference implementation of AP
    python detect.py --dataset pennfudan --data-dir DIR --arch resnet18 --backbone out/RUN/student_1_resnet18.pt
    python detect.py --dataset pennfudan --data-dir DIR --arch resnet18 --backbone random     # to compare with
    torchrun --nproc-per-node 8 detect.py --dataset coco --data-dir DIR --backbone out/RUN/student_1_resnet50.pt
    python detect.py --evaluate out/RUN/last.pt             # AP of boxes and masks
    python detect.py --predict street.jpg --checkpoint out/RUN/last.pt      # draws what it finds

Mask R-CNN, FPN and their losses are torchvision's; --dataset coco has mmdetection's 1x recipe. A run leaves log.jsonl,
last.pt, best.pt (chosen on the test set) and detections.png, truth beside prediction, in --out-dir.
"""

import signal
import sys

if __name__ == "__main__":                                 # Ctrl-C while libraries load: one line too
    signal.signal(signal.SIGINT, lambda *_: sys.exit("detect.py: interrupted before training began"))

import argparse
import contextlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import devices
import experiment
import options
from data import DataError
from devices import UserError
from experiment import say, shorten, write

ARCHITECTURES = torchvision.models.list_models(torchvision.models, ["resnet*", "resnext*", "wide_res*", "shufflenet*"])
RECIPES = {                                                # "coco" is mmdetection's 1x; "others" suits a CPU
    "coco": dict(epochs=12, batch_size=16, lr=0.02, milestones=[8, 11], warmup=500,
                 min_size=800, max_size=1333, proposals=512),
    "others": dict(epochs=10, batch_size=2, lr=0.005, milestones=[7, 9], warmup=100,
                   min_size=256, max_size=512, proposals=64),
}
SCORES = [f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")]
WIDTH = 256                                                # channels of FPN's maps
SHOWN = 0.5                                                # lowest score that is drawn


# ---------------------------------------------------------------- the algorithm

def train(args, train_set, test_set, model, run):
    """One SGD step on every batch, evaluation after every epoch."""
    for epoch in range(run.epoch, args.epochs):
        if 0 < args.max_steps <= run.total_steps:
            return
        run.start_epoch(learning_rate(args, epoch, run.total_steps))
        try:
            for batch in run.timed(read(train_set, train_plan(args, train_set, run, epoch), args.workers)):
                key = f"{args.seed},{run.total_steps},{run.processes.rank}"
                torch.manual_seed(data.random_generator(key).initial_seed())    # torchvision samples regions
                run.add(train_step(args, model, run, *zip(*batch, strict=True)), len(batch))
                run.means()                                # ends a run that is not finite; each step waits anyway
                run.after_step()
                if run.total_steps == args.max_steps and run.step < run.steps_per_epoch:
                    return run.end_early(*scored(args, test_set, model, run))
            run.end_epoch(*scored(args, test_set, model, run))
        except DataError:                                  # an image that cannot be read: what is trained is kept
            if run.processes.size == 1 and run.step:
                run.save("last.pt")
            raise


def train_step(args, model, run, images, targets):
    """One SGD step on the sum of Mask R-CNN's losses. Returns {"loss", each loss by torchvision's name}."""
    images = [image.to(args.device).float() / 255 for image in images]          # [3, H, W], each of its own size
    terms = model(images, [{k: v.to(args.device) for k, v in target.items()} for target in targets])
    loss = sum(terms.values())
    run.optimizers[0].zero_grad()
    loss.backward()

    shown = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
    (group,) = run.optimizers[0].param_groups
    group["lr"] = run.lr = learning_rate(args, run.epoch, run.total_steps)
    run.processes.average_in_place([*(p.grad for p in group["params"]), *batch_statistics(model), *shown.values()])
    run.optimizers[0].step()
    return shown


def learning_rate(args, epoch, step):
    """Times 0.1 at each milestone; from lr / 1000 up to lr in the first --warmup steps, linearly."""
    warm = min(1, 0.001 + 0.999 * step / max(1, args.warmup))
    return args.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def batch_statistics(model):
    """Running means and variances that training moves: none with --batch-norm frozen."""
    return [s for m in model.modules() if isinstance(m, nn.BatchNorm2d) for s in (m.running_mean, m.running_var)]


# ---------------------------------------------------------------- data

def coco_tools():
    """pycocotools: (COCO, COCOeval, mask)."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError("COCO's annotations and AP want a package that is not here: pip install pycocotools") from None
    return COCO, COCOeval, mask


@dataclass
class Pictures:
    """One split. coco: pycocotools' COCO. ids: of the images in use. labels: category id -> 1 ... C."""

    folder: Path
    coco: object
    ids: list
    labels: dict

    def __getitem__(self, batch):
        """[(id, flip)] -> [(image, target)]. A DataError comes back as a value: DataLoader would wrap a traceback."""
        try:
            return [self.load(number, flip) for number, flip in batch]
        except DataError as error:
            return error

    def load(self, number, flip=False):
        """Image uint8 [3, H, W] and target: boxes [n, 4] (x1, y1, x2, y2), labels [n], masks uint8 [n, H, W].

        As in torchvision's references, crowds and boxes without area are left out.
        """
        facts = self.coco.imgs[number]
        image = read_image(self.folder / facts["file_name"])
        h, w = image.shape[1:]
        if (h, w) != (facts["height"], facts["width"]):
            raise DataError(f"image {self.folder / facts['file_name']} is {w}x{h}, its annotation says "
                            f"{facts['width']}x{facts['height']}")
        objects = [a for a in self.coco.imgToAnns.get(number, ()) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]                       # x, y, w, h -> x1, y1, x2, y2
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        labels = torch.tensor([self.labels[a["category_id"]] for a in objects], dtype=torch.int64)
        try:
            masks = np.array([self.coco.annToMask(a) for a in objects], np.uint8)
            masks = torch.from_numpy(masks.reshape(len(objects), h, w))
        except Exception as error:                         # pycocotools raises many kinds
            raise DataError(f"the masks of image {facts['file_name']} cannot be read ({error})") from None
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, dict(boxes=boxes[keep], labels=labels[keep], masks=masks[keep])


def read_image(path):
    """uint8 [3, H, W], as it is stored: COCO's boxes know nothing of EXIF orientation."""
    try:
        with Image.open(path) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    except Exception as error:                             # Pillow raises many kinds for broken files
        raise DataError(f"cannot read image {path} ({error})") from None


def train_plan(args, pictures, run, epoch):
    """This process's part of the epoch's batches, from run.step on: lists of (id, flip), a function of (seed, epoch).

    A batch holds one orientation; one batch an epoch may hold both. The images that fill no batch are others each time.
    """
    generator = data.random_generator(f"{args.seed},{epoch}")
    steps = run.steps_per_epoch
    landscape = torch.tensor([pictures.coco.imgs[i]["width"] > pictures.coco.imgs[i]["height"] for i in pictures.ids])
    index = torch.randperm(len(landscape), generator=generator)[:steps * args.batch_size]
    index = index[landscape[index].sort(stable=True).indices].view(steps, -1)                # [steps, B]
    index = index[torch.randperm(steps, generator=generator)]
    flip = torch.rand(index.shape, generator=generator) < 0.5                                # [steps, B]
    rank, size = run.processes.part
    return [[(pictures.ids[i], f) for i, f in zip(*row, strict=True)]
            for row in zip(index[run.step:, rank::size].tolist(), flip[run.step:, rank::size].tolist(), strict=True)]


def read(pictures, batches, workers):
    """The [(image, target)] of each batch. Any number of workers gives the same bits. Raises DataError."""
    loader = DataLoader(pictures, batch_size=None, sampler=batches, num_workers=workers,     # an item is a whole batch
                        worker_init_fn=data.leave_group, generator=torch.Generator())        # not the global generator
    try:
        handler = signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        signal.signal(signal.SIGCHLD, handler)             # torch's raises anywhere; next() notices a dead worker too
        for item in items:
            if isinstance(item, DataError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a process that reads images has ended ({error}): try fewer --workers") from None
    finally:
        items = None                                       # ends the workers now: a traceback may keep this frame


def load_data(name, data_dir):
    """The training and the test Pictures, and the classes' names. Raises DataError.

    As in torchvision's references, an image is trained on if it has a box with both sides above a pixel.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is no folder")
    parts = ("train2017", "val2017") if name == "coco" else ("train", "val")
    train_set, test_set = pennfudan(folder) if name == "pennfudan" else [
        annotated(folder / part, folder / "annotations" / f"instances_{part}.json") for part in parts]
    classes, others = ([c["name"] for c in split.coco.cats.values()] for split in (train_set, test_set))
    if classes != others or train_set.labels != test_set.labels:
        raise DataError(f"the training set's categories ({shorten(classes)}) are not those of the test set "
                        f"({shorten(others)})")
    objects = train_set.coco.imgToAnns
    train_set.ids = [i for i in train_set.ids if any(min(a["bbox"][2:]) > 1 for a in objects.get(i, ()))]
    for split, what in ((train_set, "training"), (test_set, "test")):
        if all(a["iscrowd"] for i in split.ids for a in split.coco.imgToAnns.get(i, ())):
            raise DataError(f"no {what} image in {folder} has an object with a mask")
    return train_set, test_set, classes


def annotated(folder, source, content=None):
    """Pictures in `folder` by `content` in COCO's form, or by the file `source`. Raises DataError.

    Objects without polygon or RLE are left out.
    """
    COCO, _, _ = coco_tools()
    try:
        content = content or json.loads(source.read_bytes())
        content["annotations"] = [a for a in content["annotations"] if has_mask(a)]
        for number, a in enumerate(content["annotations"], start=1):            # COCOeval takes number 0 for no object
            _, _, w, h = a["bbox"]
            a |= dict(id=number, iscrowd=a.get("iscrowd", 0), area=a.get("area", w * h))
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        coco.cats = dict(sorted(coco.cats.items()))
        for a in coco.anns.values():
            coco.cats[a["category_id"]]["name"]
        for image in coco.imgs.values():
            folder / image["file_name"], image["width"], image["height"]
    except OSError as error:
        raise DataError(f"cannot read annotations {source} ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"annotations {source} are not in COCO's form ({type(error).__name__}: {error})") from None
    return Pictures(folder, coco, sorted(coco.imgs), {c: label for label, c in enumerate(coco.cats, start=1)})


def has_mask(annotation):
    """Drops polygons of fewer than three points, of which pycocotools would make boxes."""
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        mask = annotation["segmentation"] = [polygon for polygon in mask if len(polygon) >= 6]
    return bool(mask)


def pennfudan(folder):
    """Penn-Fudan's masks of instance numbers, brought into COCO's form; every fifth image is for testing."""
    tools = coco_tools()[2]
    images, masks = ("images", "masks/{}.png")
    if not (folder / images).is_dir():                     # the names in the original archive
        images, masks = ("PNGImages", "PedMasks/{}_mask.png")
    names = sorted(p for p in (folder / images).glob("*") if p.suffix in (".jpg", ".png"))
    if not names:
        raise DataError(f"--data-dir {folder} holds neither images/ and masks/ nor PNGImages/ and PedMasks/")
    parts = [dict(images=[], annotations=[], categories=[dict(id=1, name="person")]) for _ in range(2)]
    for number, path in enumerate(names):
        try:
            with Image.open(folder / masks.format(path.stem)) as image:
                numbers = np.array(image)                  # [H, W], 0 is background
        except Exception as error:                         # Pillow raises many kinds for broken files
            raise DataError(f"cannot read mask {folder / masks.format(path.stem)} ({error})") from None
        part = parts[number % 5 == 4]
        part["images"].append(dict(id=number, file_name=path.name, height=numbers.shape[0], width=numbers.shape[1]))
        for k in np.unique(numbers[numbers > 0]):
            rle = tools.encode(np.asfortranarray(numbers == k, np.uint8))
            part["annotations"].append(dict(image_id=number, category_id=1, segmentation=rle,
                                            area=float(tools.area(rle)), bbox=tools.toBbox(rle).tolist()))
    return [annotated(folder / images, folder, part) for part in parts]


# ---------------------------------------------------------------- the detector

def build(args, classes, mean, std, weights=None):
    """Mask R-CNN on the backbone. mean, std: of the images that it was trained on. weights: its state_dict, or None."""
    torch.manual_seed(args.seed)
    net = torchvision.models.get_model(args.arch, weights=None)
    if weights:
        net.load_state_dict(weights, strict=False)
    layers = (["maxpool", "stage2", "stage3", "stage4"] if hasattr(net, "stage2") else       # whose maps FPN reads:
              ["layer1", "layer2", "layer3", "layer4"])                                      # strides 4, 8, 16, 32
    names = [name for name, _ in net.named_children()]
    frozen = names[:names.index(layers[args.freeze - 1]) + 1] if args.freeze else []         # the first maps' layers
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.BatchNorm2d) and (args.batch_norm == "frozen" or name.split(".")[0] in frozen):
            constant = FrozenBatchNorm2d(norm.num_features, norm.eps)
            constant.load_state_dict(norm.state_dict())
            net.set_submodule(name, constant)
    channels = getattr(net, "_stage_out_channels", None) or [net.fc.in_features // k for k in (8, 4, 2, 1)]
    fpn = BackboneWithFPN(net, {name: str(i) for i, name in enumerate(layers)}, channels[:4], WIDTH)
    n = args.proposals                                     # 512 gives torchvision's defaults
    model = MaskRCNN(fpn, len(classes) + 1, args.min_size, args.max_size, list(mean), list(std),
                     box_batch_size_per_image=n,
                     rpn_pre_nms_top_n_train=min(2000, 4 * n), rpn_post_nms_top_n_train=min(2000, 4 * n),
                     rpn_pre_nms_top_n_test=min(1000, 2 * n), rpn_post_nms_top_n_test=min(1000, 2 * n))
    if args.amp == "bf16":
        heads = model.roi_heads
        for part in (fpn, model.rpn.head, heads.box_head, heads.box_predictor, heads.mask_head, heads.mask_predictor):
            compute_in_bfloat16(part, args.device.type)
    return model.to(args.device)


def compute_in_bfloat16(module, kind):
    """In training. Its outputs are float32: boxes decoded in bfloat16 would be 4 pixels off at 1,000."""
    plain = module.forward

    def forward(*inputs):
        with torch.autocast(kind, torch.bfloat16, enabled=module.training):
            return in_float32(plain(*inputs))
    module.forward = forward


def in_float32(x):
    if isinstance(x, dict):
        return {k: in_float32(v) for k, v in x.items()}
    return x.float() if isinstance(x, torch.Tensor) else type(x)(map(in_float32, x))


def load_backbone(path, arch):
    """(tensors by torchvision's names, mean and std of the images that they are used to, a sentence on what was taken).

    path: a student file, or a state_dict of torchvision's. Raises UserError if it is of another architecture.
    """
    if path == "random":
        return None, *data.IMAGENET, "random weights"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_student, kind = "architecture" in content, content.get("architecture", arch)
        tensors, mean, std = ((content[k] for k in ("state_dict", "mean", "std")) if is_student else
                              (content, *data.IMAGENET))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
    except OSError as error:
        raise UserError(f"cannot read --backbone {path} ({error.strerror or error})") from None
    except Exception as error:                             # torch names no class for files that it does not understand
        raise UserError(f"--backbone {path} is neither a student file nor a state_dict "
                        f"({str(error).splitlines()[0][:60]})") from None
    with torch.device("meta"):
        net = torchvision.models.get_model(arch, weights=None)
    own = {name: tensor.shape for name, tensor in net.state_dict().items()}
    used = {k for k in own if not k.startswith(("fc.", "conv5."))}              # these come after the last map
    wrong = sorted(shapes.keys() - own.keys() | {k for k in used if shapes.get(k) != own[k]
                                                 and not k.endswith("num_batches_tracked")})   # not in older files
    if wrong or kind != arch:
        raise UserError(f"--backbone {path} is no {arch} but {kind if is_student else 'something else'}: "
                        f"{len(wrong)} tensors do not fit ({shorten(wrong, 2)})")
    taken = {name: tensor for name, tensor in tensors.items() if name in used}
    left = sorted({name.split(".")[0] for name in shapes.keys() - used})
    return taken, mean, std, f"{path}: {len(taken)} tensors taken, left out {' '.join(left) or 'none'}"


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def detect(model, image, device):
    """uint8 [3, H, W] -> boxes [n, 4], labels [n], scores [n], masks bool [n, H, W], on the host."""
    (found,) = model.eval()([image.to(device).float() / 255])
    found["masks"] = found["masks"][:, 0] > 0.5            # [n, 1, H, W] -> [n, H, W]
    return {name: value.cpu() for name, value in found.items()}


def as_results(found, number, categories):
    """One image's detections in the form of COCO's result files. categories: the category id of label 1, 2, ..."""
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)    # x, y, w, h
    masks = coco_tools()[2].encode(np.asfortranarray(found["masks"].permute(1, 2, 0).numpy(), np.uint8))
    columns = found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), masks
    return [dict(image_id=number, category_id=categories[label - 1], score=score, bbox=box, segmentation=mask)
            for label, score, box, mask in zip(*columns, strict=True)]


def average_precision(coco, results):
    """COCOeval's AP, AP50 and AP75 of boxes and of masks, in percent, by the names in SCORES."""
    COCOeval, values = coco_tools()[1], []
    if not results:                                        # pycocotools reads the first one
        return dict.fromkeys(SCORES, 0.0)
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation")):
        mine = [{k: r[k] for k in ("image_id", "category_id", "score", key)} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(coco, coco.loadRes(mine), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values += [round(100 * float(x), 2) for x in evaluation.stats[:3]]
    return dict(zip(SCORES, values, strict=True))


def evaluate(args, pictures, model, processes):
    """AP on all pictures, which the processes share; process 0 computes it for all."""
    rank, size = processes.part
    ids, categories, results = pictures.ids[rank::size], list(pictures.labels), []
    for number, batch in zip(ids, read(pictures, [[(i, False)] for i in ids], args.workers), strict=True):
        results += as_results(detect(model, batch[0][0], args.device), number, categories)
    results = [r for part in processes.gather_objects(results) for r in part]
    return processes.gather_objects(average_precision(pictures.coco, results) if rank == 0 else None)[0]


def scored(args, test_set, model, run):
    """The epoch's line, printed and drawn, and the score that best.pt is chosen by: mean of box and mask AP."""
    run.stop_clock()
    run.show_progress("evaluation", every=0)
    scores = evaluate(args, test_set, model, run.processes)
    line = run.line(lr=run.lr, **scores)
    if run.speaks:
        if sys.stderr.isatty():
            experiment.show_line("")
        say(f"epoch {line['epoch']:3d}  step {line['step']}  lr {run.lr:.5f}  loss {line['loss']:.3f}  "
            f"{words(scores)}  {line['images_per_second']:.1f} images/s")
        rows = []
        for number in test_set.ids[::max(1, len(test_set.ids) // 4)][:4]:
            image, truth = test_set.load(number)
            found = detect(model, image, args.device)
            rows.append([draw(image, objects, run.facts["classes"]) for objects in (truth, found)])
        write(run.out / "detections.png", png(rows))
    return line, (scores["box_ap"] + scores["mask_ap"]) / 2


def words(scores):
    return ("box AP {box_ap:.2f} (AP50 {box_ap50:.2f}, AP75 {box_ap75:.2f})  "
            "mask AP {mask_ap:.2f} (AP50 {mask_ap50:.2f}, AP75 {mask_ap75:.2f})").format(**scores)


# ---------------------------------------------------------------- pictures

def draw(image, found, classes):
    """uint8 [3, H, W] with boxes, masks and names of a target, or of detections of at least SHOWN with their scores."""
    scores = found.get("scores", torch.ones(len(found["boxes"])))
    keep = scores >= SHOWN
    if not keep.any():
        return image
    colors = [PALETTE[i % len(PALETTE)] for i in range(int(keep.sum()))]
    names = [classes[label - 1] + (f" {score:.2f}" if "scores" in found else "")
             for label, score in zip(found["labels"][keep].tolist(), scores[keep].tolist(), strict=True)]
    image = draw_segmentation_masks(image, found["masks"][keep].bool(), alpha=0.45, colors=colors)
    return draw_bounding_boxes(image, found["boxes"][keep], names, colors, width=2, fill_labels=True)


PALETTE = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#ffe119"]


def png(rows, height=320):
    """Bytes of a PNG: each row's pictures, uint8 [3, H, W], side by side and of one height, with white gaps."""
    lines = []
    for row in rows:
        scaled = [F.resize(p, [height, round(height * p.shape[2] / p.shape[1])], antialias=True) for p in row]
        lines.append(torch.cat([F.pad(p, [0, 0, 6, 6], fill=255) for p in scaled], 2))       # [3, height + 6, W]
    width = max(line.shape[2] for line in lines)
    page = torch.cat([F.pad(line, [0, 0, width - line.shape[2], 0], fill=255) for line in lines], 1)
    buffer = io.BytesIO()
    F.to_pil_image(page).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- a checkpoint's detector

def trained_detector(args, path):
    """The detector of last.pt or best.pt, the options of its run and its classes."""
    state = experiment.load_checkpoint(path)
    if "backbone" not in state["args"]:
        raise UserError(f"{path} is no checkpoint of detect.py")
    saved = argparse.Namespace(**{**state["args"], "device": args.device, "workers": args.workers})
    model = build(saved, state["classes"], state["mean"], state["std"])
    model.load_state_dict(state["model"])
    return model, saved, state["classes"]


def evaluate_file(args):
    """--evaluate: AP of last.pt or best.pt on its own test set, or on that of --dataset and --data-dir."""
    model, saved, classes = trained_detector(args, args.evaluate)
    _, test_set, others = load_data(args.dataset or saved.dataset, args.data_dir or saved.data_dir)
    if classes != others:
        raise UserError(f"{args.evaluate} was trained on other classes ({shorten(classes)}) than those of --data-dir "
                        f"({shorten(others)})")
    say(words(evaluate(saved, test_set, model, devices.Processes({}))))


def predict(args):
    """--predict: what is found in each picture, one line each, and a copy with it drawn."""
    model, _, classes = trained_detector(args, args.checkpoint)
    out = Path(args.out_dir or Path(args.checkpoint).parent)
    for path in map(Path, args.predict):
        image = read_image(path)
        found = detect(model, image, args.device)
        pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        shown = [f"{classes[label - 1]} {score:.2f}" for label, score in pairs if score >= SHOWN]
        drawn = out / f"{path.stem}_detections.png"
        write(drawn, png([[draw(image, found, classes)]], image.shape[1]))
        say(f"{path}  {shorten(shown) or 'nothing'}; drawn in {drawn}")


# ---------------------------------------------------------------- options and setting up

def build_parser():
    p = options.Parser(prog="detect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument("--backbone", metavar="FILE", help="a student file of train.py, torchvision's weights (a "
                   "state_dict), or: random")
    g.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="NAME",
                   help="the backbone's architecture (resnet50): " + ", ".join(ARCHITECTURES))
    g.add_argument("--freeze", type=int, metavar="N", help="keep as they are, batch norm too, the layers up to the "
                   "N-th of the four maps that FPN reads; 1: ResNet's conv1, bn1 and layer1, ShuffleNetV2's conv1; "
                   "0: none (1; random 0)")
    g.add_argument("--batch-norm", choices=["frozen", "train"], help="of the backbone: statistics, scale and shift "
                   "stay, or are trained (frozen; random train)")
    g.add_argument("--proposals", type=int, metavar="N", help="regions an image that the heads train on; RPN proposes "
                   "four times as many, at most 2000 (512; pennfudan 64)")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=["coco", "pennfudan", "own"], help="coco: train2017/, val2017/ and "
                   "annotations/instances_{train,val}2017.json in DATA_DIR; own: the same without 2017; pennfudan: "
                   "images/ and masks/, or PNGImages/ and PedMasks/")
    g.add_argument("--data-dir", metavar="DIR", help="where it is (data)")
    g.add_argument("--min-size", type=int, metavar="PIXELS", help="images get this shorter side (800; pennfudan 256)")
    g.add_argument("--max-size", type=int, metavar="PIXELS", help="and no longer one above this (1333; pennfudan 512)")
    g.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                   help="processes that read images (4, or the number of CPUs)")
    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=int, help="(12; pennfudan 10)")
    g.add_argument("--batch-size", type=int, help="images a step, of all processes together (16; pennfudan 2)")
    g.add_argument("--lr", type=float, help="learning rate of SGD (0.02; pennfudan 0.005)")
    g.add_argument("--milestones", type=int, nargs="+", metavar="EPOCH", help="times 0.1 at each (8 11; pennfudan 7 9)")
    g.add_argument("--warmup", type=int, metavar="STEPS", help="linear, from lr / 1000 (500; pennfudan 100)")
    g.add_argument("--momentum", type=float, default=0.9, help="(0.9)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="(1e-4)")
    g.add_argument("--seed", type=int, default=0, help="of initial weights, batches, flips and sampled regions (0)")
    g = options.running(p)
    g.add_argument("--evaluate", metavar="FILE", help="print AP of last.pt or best.pt, and end")
    g.add_argument("--predict", nargs="+", metavar="IMAGE", help="draw what --checkpoint finds in pictures, in "
                   "--out-dir or beside the checkpoint, and end")
    g.add_argument("--checkpoint", metavar="FILE", help="of --predict: last.pt or best.pt")
    p.set_defaults(cuda_graph=False)                       # Run asks; the detector's shapes change with every batch
    return p


def parse(argv=None):
    """The options, complete and checked; a wrong one ends the program with one line and status 2."""
    p = build_parser()
    args = p.parse_args(argv)
    if args.evaluate and args.predict or bool(args.predict) != bool(args.checkpoint):
        p.error("argument --predict: goes with --checkpoint, and without --evaluate")
    if not (args.evaluate or args.predict):
        for flag in ("dataset", "backbone"):
            if not vars(args)[flag]:
                p.error(f"argument --{flag}: is needed")
        args.data_dir = "data" if args.data_dir is None else args.data_dir
    fill(args)
    p.check(args, [("--freeze", 0 <= args.freeze <= 4, "0 to 4"), ("--proposals", args.proposals >= 8, "at least 8"),
                   ("--batch-size", args.batch_size >= 1, "at least 1"), ("--warmup", args.warmup >= 0, "0 or more"),
                   ("--min-size", args.min_size >= 32, "at least 32"),
                   ("--max-size", args.max_size >= args.min_size, "at least --min-size"),
                   ("--milestones", all(m >= 1 for m in args.milestones), "epochs from 1 on"),
                   *options.running_rules(args)])
    if args.out_dir is None and args.backbone:
        usual = vars(fill(p.parse_args(["--dataset", args.dataset, "--backbone", args.backbone])))
        other = [f"-{k.replace('_', '-')}-{v}" for k, v in sorted(vars(args).items()) if v != usual[k]
                 and k not in options.WHERE | {"dataset", "arch", "backbone", "seed", "deterministic"}]
        origin = "-".join(Path(args.backbone).with_suffix("").parts[-2:])
        name = f"detect-{args.dataset}-{args.arch}-{origin}-{args.seed}" + "".join(other)
        args.out_dir = "out/" + re.sub(r"[^\w.+-]+", "_", name)[:200]
    return args


def fill(args):
    """The recipe's defaults."""
    random = args.backbone == "random"                     # constant random layers would teach nothing
    recipe = RECIPES["coco" if args.dataset in ("coco", "own") else "others"]
    for name, value in {**recipe, "freeze": 0 if random else 1, "batch_norm": "train" if random else "frozen"}.items():
        if vars(args)[name] is None:
            vars(args)[name] = value
    return args


def report(args, model, source, train_set, test_set, classes, run):
    """What will be trained, on what, for how long."""
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    empty = len(train_set.coco.imgs) - len(train_set.ids)
    say(f"backbone   {args.arch}, {source}")
    say(f"detector   Mask R-CNN with FPN: {whole:,} parameters, {trained:,} trained; --freeze {args.freeze}, "
        f"batch norm {args.batch_norm}")
    say(f"data       {args.dataset}: {len(train_set.ids):,} training"
        + (f" ({empty:,} without objects left out)" if empty else "")
        + f" and {len(test_set.ids):,} test images, {len(classes)} class{'es' * (len(classes) > 1)}: "
        f"{shorten(classes)}; shorter side {args.min_size}, longer at most {args.max_size}")
    say(f"device     {devices.device_name(args.device)}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}" + (f", {run.processes.size} processes" if run.processes.size > 1 else ""))
    say(f"steps      {args.epochs} epochs of {run.steps_per_epoch} steps of {args.batch_size} = "
        f"{args.epochs * run.steps_per_epoch:,}" + (f", ending at {args.max_steps:,}" if args.max_steps else "")
        + f"; drops at {args.milestones}, warm-up {args.warmup} steps")
    say(f"output     {run.out}")


def main(argv=None):
    """Run the command line; whatever the user can mend ends in one line and status 1 (2 for a wrong flag)."""
    args = parse(argv)
    with experiment.one_line_errors("detect.py", (UserError, DataError), args):
        processes = devices.Processes()
        args.device = devices.pick_device(args.device, processes)
        if args.deterministic:
            devices.be_deterministic()
        if args.evaluate or args.predict:
            return evaluate_file(args) if args.evaluate else predict(args)
        if args.batch_size % processes.size:
            raise UserError(f"--batch-size {args.batch_size} must divide by the {processes.size} processes")
        coco_tools()                                       # before anything is read or trained
        out = experiment.OutDir(args.out_dir)
        state = out.find_checkpoint(args, options.WHERE, processes)
        weights, mean, std, source = ((None, state["mean"], state["std"], "from last.pt") if state else
                                      load_backbone(args.backbone, args.arch))
        train_set, test_set, classes = load_data(args.dataset, args.data_dir)
        if args.batch_size > len(train_set.ids):
            raise UserError(f"--batch-size {args.batch_size} is larger than the training set "
                            f"({len(train_set.ids)} images)")
        if state and state["classes"] != classes:
            raise UserError(f"{out / 'last.pt'} was trained on other classes ({shorten(state['classes'])}) than those "
                            f"in --data-dir {args.data_dir} ({shorten(classes)}): give its own")
        model, facts = build(args, classes, mean, std, weights), dict(classes=classes, mean=list(mean), std=list(std))
        with experiment.Signals("detect.py", processes.rank == 0) as signals:
            start(args, train_set, test_set, model, out, state, source, facts, processes, signals)


def start(args, train_set, test_set, model, out, state, source, facts, processes, signals):
    """Connect the processes, take up what was found, train."""
    if processes.rank == 0:
        out.open()
    processes.start(args.device)
    processes.broadcast(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, args.momentum,
                                weight_decay=args.weight_decay)
    steps = len(train_set.ids) // args.batch_size
    run = experiment.Run(args, out, model, [optimizer], facts, steps, steps * args.batch_size, processes, signals)
    if run.speaks:
        report(args, model, source, train_set, test_set, facts["classes"], run)
    if state:
        run.load(state)
        state.clear()                                      # its tensors are not needed twice
    if run.speaks and args.resume:
        say(f"resuming   {out / 'last.pt'}, {run.total_steps:,} steps done" if run.total_steps else
            f"resuming   no {out / 'last.pt'}: starting afresh")
    run.write_log()
    train(args, train_set, test_set, model, run)
    if run.speaks:
        say(f"ended      {run.total_steps:,} steps, best epoch {run.best_epoch} (mean of box and mask AP "
            f"{run.best:.2f}, best.pt); next: --evaluate {out / 'last.pt'}, or --predict IMAGE --checkpoint "
            f"{out / 'last.pt'}")
    processes.stop()


if __name__ == "__main__":
    main()
