"""Use what was trained: name what is on pictures, evaluate on a data set, export for use elsewhere.

    python predict.py cat.jpg photos --student out/RUN/student_1_resnet32.pt  # likeliest classes
    python predict.py cat.jpg --student out/RUN/best.pt             # by its students' mean
    python predict.py --student out/RUN/last.pt --dataset cifar100  # top-1, top-5 of each student
    python predict.py --student FILE --export net.pt2               # torch.export, any batch size
    python predict.py --student FILE --export net.onnx              # pip install onnx onnxscript
    python predict.py --student out/RUN/best.pt --export net.pt     # a student file

FILE is a student file, last.pt or best.pt. Of several students each is exported by itself, as
net_1.pt2, net_2.pt2. An exported network takes uint8 images [B, 3, S, S] of its own size S,
normalises them itself and returns probabilities [B, C]; it carries the names of its classes:

    extra = {"classes.json": ""}                                   # needs PyTorch alone
    network = torch.export.load("net.pt2", extra_files=extra).module()
    probabilities = network(images)
    classes = json.loads(extra["classes.json"])
"""

import support.interrupt  # noqa: F401  first: Ctrl-C while libraries load

import argparse
import io
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import data
import models
from support import arguments
from support.architectures import load_model_file
from support.console import UserError, one_line_errors, say, shorten, warn
from support.files import (
    STUDENT_FILE,
    find_weights,
    is_checkpoint,
    is_student_file,
    load_checkpoint,
    load_into,
    load_state,
    make_folder,
    names_in_files,
    read,
    student_file,
    torch_bytes,
    without_prefix,
    write,
)
from support.images import CentreView, fit, pictures, to_rgb
from support.processes import Processes, pick_device
from train import evaluate

KINDS = (".pt2", ".onnx", ".pt")


# ---------------------------------------------------------------- a trained student

class TrainedStudent(models.Backbone):
    """A student of a file. Called with normalised images [B, 3, H, W], returns logits [B, C].

    Stays in eval mode, also inside a module that is put into training: a teacher whose batch
    statistics moved would be another one.
    Has the file's facts as attributes: architecture, classes, mean, std, image_size, resize; see
    support.files.student_file.
    """

    def __init__(self, content):
        super().__init__(content["architecture"], len(content["classes"]))
        for fact in STUDENT_FILE[:-1]:
            setattr(self, fact, content[fact])
        names = names_in_files(self, self.architecture).values()
        state, before = without_prefix(content["state_dict"], names)
        if before:
            warn(f"the student file's names begin with {before!r}, which is left out")
        load_state(self, self.architecture, state, "the student file")
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def crop(self, image):
        """A Pillow image of any mode, or uint8 [3, H, W] -> uint8 [3, image_size, image_size].

        As at evaluation. Raises UserError for any other tensor.
        """
        pixels = image if isinstance(image, Tensor) else transforms.pil_to_tensor(to_rgb(image))
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) != 3:
            raise UserError("an image must be uint8 [3, H, W], "
                            f"got {pixels.dtype} {list(pixels.shape)}")
        if self.resize != self.image_size:  # trained on streamed images
            return CentreView(self.resize, self.image_size)(pixels)
        return transforms.pil_to_tensor(fit(transforms.to_pil_image(pixels), self.image_size))

    def transform(self, image):
        """A Pillow image of any mode, or uint8 [3, H, W] -> float32 [3, image_size, image_size]."""
        mean, std = torch.tensor([self.mean, self.std])[..., None, None]  # [3, 1, 1] each
        return (self.crop(image) - 255 * mean) / (255 * std)


class Probabilities(nn.Module):
    """What is exported: uint8 images [B, 3, S, S] -> probabilities [B, C]. It can change device."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        mean_std = torch.tensor([student.mean, student.std])[..., None, None]  # [2, 3, 1, 1]
        self.register_buffer("mean_std", 255 * mean_std)

    def forward(self, images):
        mean, std = self.mean_std
        return self.student((images - mean) / std).softmax(-1)


def load_student(file):
    """The `TrainedStudent` of a student file, by its path or its content.

    Raises UserError for any other file.
    """
    if isinstance(file, dict):
        return TrainedStudent(find_student(file, "the content"))
    return TrainedStudent(find_student(read(file), file))


def find_student(content, path):
    """The content of the one student file in what a file holds. Raises UserError without one."""
    if is_checkpoint(content):
        raise UserError(f"{path} is no student file but a run's checkpoint: "
                        "python predict.py --student FILE --export NEW.pt makes student files "
                        "of it")
    found, where = find_weights(content, path)
    if not is_student_file(found):
        raise UserError(f"{path} is no checkpoint of this program and no student file, but holds "
                        f"{len(found)} tensors alone ({shorten(found, 3)}): student_*.pt of a run "
                        "has the names of its classes, too")
    if where:
        warn(f"the student file is {path}'s {where}")
    return found


def load_contents(path, model_file=None):
    """(contents, run_args) of a file: its students as student files' contents, its run's options.

    The file: a student file, which knows no options (None), or last.pt or best.pt. model_file: the
    one that defines the students; a checkpoint's own is not run. Raises UserError.
    """
    if model_file:
        load_model_file(model_file)
    content = read(path)
    if not is_checkpoint(content):
        return [find_student(content, path)], None
    state = load_checkpoint(path)
    if "method" not in state["args"]:
        raise UserError(f"{path} is no checkpoint of train.py")
    run_args = argparse.Namespace(**state["args"])
    if run_args.model_file and not model_file:
        raise UserError(f"{path} was trained with --model-file {run_args.model_file}: "
                        "give it here, too")
    cohort, contents = models.Cohort(run_args.arch, len(state["classes"]), branches=False), []
    for a, (architecture, student) in enumerate(zip(run_args.arch, cohort.students, strict=True)):
        # a method with embeddings has a cohort in its students; an own one may hold copies of both
        place = re.compile(rf"students\.(cohort\.)?students\.{a}\.backbone\.(.*)")
        found = {key: place.fullmatch(key) for key in state["model"]}
        own = {match[2]: state["model"][key] for key, match in found.items() if match}
        load_into(student.backbone, own, path)
        contents.append(student_file(student.backbone, architecture, state))
    return contents, run_args


# ---------------------------------------------------------------- its uses

@torch.no_grad()
def predict(students, paths, device):
    """The five likeliest classes of each picture, one line each, by the students' mean."""
    for path, pixels in pictures(paths):
        image = students[0].transform(pixels)[None].to(device)  # [1, 3, H, W]
        each = torch.stack([student(image).softmax(-1)[0] for student in students])  # [N, C]
        best = each.mean(0).topk(min(5, each.shape[1]))
        words = []
        for p, c in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            words.append(f"{students[0].classes[c]} {p:.2f}")
        say(f"{path}  {'  '.join(words)}")


def evaluate_students(students, args, run_args):
    """Top-1 and top-5 of every student on --dataset's test images.

    run_args: the run's, where known.
    """
    first = students[0]
    same_data = run_args and run_args.dataset == args.dataset
    data_dir = args.data_dir or (run_args.data_dir if same_data else "data")
    split = run_args if same_data else args  # its seed and fraction say which images are held back
    streamed = args.dataset == "folder" and first.resize != first.image_size
    dataset = data.load(args.dataset, data_dir, first.image_size, stream=streamed, seed=split.seed,
                        validation_fraction=split.validation_fraction, workers=args.workers)
    dataset.check_classes(first.classes, args.student, data_dir)
    dataset.mean, dataset.std = first.mean, first.std
    dataset = dataset.to(args.device)
    scores = evaluate(students, dataset.test_batches("test"), Processes({}))
    for a, (student, top1, top5) in enumerate(zip(students, *scores, strict=True), start=1):
        say(f"student {a}  {student.architecture}: top-1 {top1:.2f}  top-5 {top5:.2f}")


def export(contents, path):
    """Each student by itself as path, or path_1, path_2 of several; the ending says how."""
    path = Path(os.path.expanduser(path))
    make_folder(path.parent, "the folder of --export")
    for a, content in enumerate(contents, start=1):
        own = path.with_stem(f"{path.stem}_{a}") if len(contents) > 1 else path
        write(own, as_bytes(content, path.suffix))
        size, classes = content["image_size"], len(content["classes"])
        use = f"uint8 [B, 3, {size}, {size}] -> probabilities"
        if path.suffix == ".pt":
            use = "student file"
        say(f"student {a}  {content['architecture']}: {own}, {use}, {classes} classes")


def as_bytes(content, suffix):
    """A student file's content in the form of that ending."""
    if suffix == ".pt":
        return torch_bytes(content)
    network, size = Probabilities(load_student(content)).eval(), content["image_size"]
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    classes, buffer = json.dumps(content["classes"]), io.BytesIO()
    if suffix == ".pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=batch)
        torch.export.save(program, buffer, extra_files={"classes.json": classes})
        return buffer.getvalue()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx wants both
    except ImportError:
        raise UserError("--export FILE.onnx wants packages that are not here: "
                        "pip install onnx onnxscript") from None
    program = torch.onnx.export(
        network, (example,), dynamo=True, dynamic_shapes=batch, verbose=False,
        input_names=["images"], output_names=["probabilities"])
    program.model.metadata_props["classes"] = classes
    return program.model_proto.SerializeToString()


# ---------------------------------------------------------------- the command line

def build_parser():
    p = arguments.Parser("predict.py", __doc__)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="pictures, or folders of them")
    p.add_argument("--student", required=True, type=arguments.name("a file's name"), metavar="FILE",
                   help="a student file, last.pt or best.pt of train.py")
    p.add_argument("--export", type=arguments.name("a file's name"), metavar="FILE",
                   help="write the network to FILE.pt2, FILE.onnx or FILE.pt")
    p.add_argument("--dataset", choices=data.DATASETS,
                   help="evaluate on this data set's test images")
    p.add_argument("--data-dir", metavar="DIR", help="its folder (a checkpoint's own, or data)")
    p.add_argument("--validation-fraction", type=arguments.fraction, default=0.0, metavar="F",
                   help="of the run, for a student file and a folder without test images (0)")
    p.add_argument("--seed", type=arguments.seed, default=0, help="of the run, likewise (0)")
    p.add_argument("--workers", type=arguments.at_least_0, default=arguments.WORKERS,
                   help="processes that read streamed images (4, or the number of CPUs)")
    p.add_argument("--model-file", metavar="FILE",
                   help="the Python file that defines the student, if it is your own")
    p.add_argument("--device", default="auto",
                   help="cpu, cuda or cuda:1; auto: CUDA if it is there (auto)")
    return p


def main(argv=None):
    """Run the command line; what the user can mend ends in one line and status 1.

    A wrong flag: status 2.
    """
    p = build_parser()
    args = p.parse_args(argv)
    if not (args.images or args.dataset or args.export):
        p.error("nothing to do: give pictures, --dataset or --export")
    if args.export and Path(args.export).suffix not in KINDS:
        p.error(f"argument --export: must end in {', '.join(KINDS)}")
    with one_line_errors("predict.py", args):
        processes = Processes()
        processes.be_alone("predict.py")
        args.device = pick_device(args.device, processes)
        contents, run_args = load_contents(args.student, args.model_file)
        students = [load_student(content).to(args.device) for content in contents]
        if args.dataset:
            evaluate_students(students, args, run_args)
        predict(students, args.images, args.device)
        if args.export:
            export(contents, args.export)


if __name__ == "__main__":
    main()
