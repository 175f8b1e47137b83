"""Files that are whole or not there: checkpoints of runs and trained students.

A checkpoint is what torch.save writes, followed by the SHA-256 of it: 32 bytes, which torch.load
passes over. All files are loaded with weights_only=True, so no code of whoever wrote one is run.
"""

import contextlib
import copy
import errno
import hashlib
import io
import os
import re
import shutil
import warnings
from pathlib import Path

import torch

from support.architectures import ExistingNetwork, architecture
from support.console import UserError, first_line, shorten

DIGEST = hashlib.sha256().digest_size
CHECKPOINT_FORMAT = 3
STUDENT_FILE = ("architecture", "classes", "mean", "std", "image_size", "resize", "state_dict")


def write(path, content, keep=None):
    """Put bytes into path: a reader finds the old file or the new, whole, even after a power cut.

    keep: the name under which the previous file stays. Raises UserError, the old file in place.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a read-only file system not even this
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        room = f"make room for {len(content) / 2 ** 20:.1f} MiB or " if full else ""
        raise UserError(f"cannot write {path} ({error.strerror}): {room}give another folder; "
                        "what was there before is untouched") from None


def link(path, name):
    """A second name for the file at path, put in the place of whatever had that name."""
    temporary = Path(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # FAT and some network file systems have no hard links, and say so in many ways
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


def sync_folder(folder):
    """After a power cut a new name is there only if its folder was written too."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # some network file systems sync no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def make_folder(folder, option):
    """Make the folder and return its Path. Raises UserError that names the option it came from."""
    folder = Path(os.path.expanduser(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {option} {folder} ({error.strerror}): give another") from None
    return folder


def torch_bytes(state):
    """What torch.save would write."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read(path):
    """torch.load of tensors and plain values. Raises UserError for a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below have better words
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from None
    except Exception as error:  # pickle and zip raise many kinds
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        kind = found[1] if found else "TorchScript" if "TorchScript" in str(error) else None
        if not kind:
            raise UserError(f"{path} is no file of weights, or damaged") from error
        raise UserError(f"{path} holds objects of {kind}, and code of a file is not run. "
                        "Where you trust it, x = torch.load(FILE, weights_only=False) has what "
                        "it holds: save the weights alone, torch.save(x['model'], NEW) if that "
                        "is their name, or torch.save(x.state_dict(), NEW) of a module") from error


def save_checkpoint(path, state, keep=None):
    """Write a dictionary of tensors and plain values as a checkpoint. keep: as in `write`."""
    buffer = io.BytesIO()  # one copy in memory: with a bank it may be gigabytes
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(path, buffer.getbuffer(), keep)


def load_checkpoint(path, device="cpu"):
    """The dictionary that `save_checkpoint` wrote. Raises UserError for any other file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
        raise UserError(f"{path} is damaged, or no checkpoint of this program")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch names no class for files that it does not understand
        reason = (str(error) or repr(error)).splitlines()[0][:60]
        raise UserError(f"{path} is no checkpoint of this program ({reason})") from None
    if not is_checkpoint(state):
        raise UserError(f"{path} is no checkpoint of this program (last.pt and best.pt of an "
                        "--out-dir are)")
    if state["format"] != CHECKPOINT_FORMAT:
        age = "newer" if state["format"] > CHECKPOINT_FORMAT else "older"
        raise UserError(f"{path} is of format {state['format']}, {age} than this program's "
                        f"{CHECKPOINT_FORMAT}: use the version that its log.jsonl belongs to")
    return state


def best_epoch_of(path):
    """best_epoch in a checkpoint, whose tensors stay on the disk; None if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["best_epoch"]
    except Exception:  # torch names no class for files that it does not understand
        return None


def load_into(module, state, path):
    """module.load_state_dict(state). Raises UserError if the file at path has other networks."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:150]
        raise UserError(f"{path} holds other networks ({reason}): has the program or --model-file "
                        "changed since? Give the one that it was made by") from None


def student_file(backbone, name, facts):
    """A trained student as a plain dict for torch.save.

    backbone: models.Backbone of the architecture `name`. facts: a mapping with classes, names; mean
    and std of the training images, per channel, in units of [0, 1]; image_size and resize, the side
    of the images and their shorter side before the evaluation's crop, in pixels.
    The state_dict of an `ExistingNetwork` loads into that network:
    torchvision.models.resnet18(num_classes=C).load_state_dict(torch.load(path)["state_dict"]).
    """
    found, state = architecture(name), {}
    if isinstance(found, ExistingNetwork):  # its state_dict, with the version that MNASNet asks for
        state = found.build(num_classes=len(facts["classes"])).state_dict()
    own = backbone.state_dict()
    for key, theirs in names_in_files(backbone, name).items():
        tensor = own[key].cpu()
        state[theirs] = tensor.clone(memory_format=torch.contiguous_format)
    classes, mean, std = (list(facts[fact]) for fact in ("classes", "mean", "std"))
    return dict(architecture=name, classes=classes, mean=mean, std=std,
                image_size=facts["image_size"], resize=facts["resize"], state_dict=state)


def is_student_file(content):
    return isinstance(content, dict) and content.keys() >= set(STUDENT_FILE)


def is_checkpoint(content):
    return isinstance(content, dict) and content.keys() >= {"format", "args"}


def names_in_files(backbone, name):
    """{name of a tensor in the backbone: in files}; those of an ExistingNetwork keep their own."""
    prefixes = getattr(architecture(name), "prefixes", {"": ""})
    names = {}
    for key in backbone.state_dict():
        prefix = next(p for p in prefixes if key.startswith(p))
        names[key] = prefixes[prefix] + key.removeprefix(prefix)
    return names


def find_weights(content, path):
    """The one student file or dictionary of tensors in what a file holds, and where: "" at its top.

    Raises UserError, which says what is there, if there are several or none.
    """
    found = dict(search(content))
    if len(found) == 1:
        return *found.values(), *found
    if found:
        raise UserError(f"{path} holds several dictionaries of tensors ({shorten(found)}): "
                        "save the one that is meant in a file of its own, by torch.save")
    kind = type(content).__name__
    inside = f" of {shorten(content)}" if isinstance(content, dict) and content else ""
    raise UserError(f"{path} holds no dictionary of tensors, but a {kind}{inside}: give a student "
                    "file or what torch.save(model.state_dict(), FILE) writes")


def search(content, where=""):
    """(where, x) for each student file and each dictionary of tensors,
    in dictionaries of any depth."""
    if not isinstance(content, dict):
        return
    if is_student_file(content) or content and all(map(torch.is_tensor, content.values())):
        yield where, content
        return
    for key, value in content.items():
        if isinstance(key, str):  # the numbers of an optimizer's parameters are none
            yield from search(value, f"{where}[{key!r}]")


def without_prefix(state, names):
    """A state_dict by these names, less what stands before all of its own ("module."); and that."""
    common = lambda some: "".join(os.path.commonprefix(list(some)).rpartition(".")[:2])
    before, ours = common(state), common(names)
    if not before or state.keys() & set(names):
        return state, ""
    return {ours + key.removeprefix(before): tensor for key, tensor in state.items()}, before


def load_state(backbone, name, state, title):
    """Load a state_dict with files' names. Raises UserError, with nothing loaded, if unfit."""
    names = names_in_files(backbone, name)
    ours = {theirs: key for key, theirs in names.items()}
    try:  # it loads what fits before it raises
        copy.deepcopy(backbone).load_state_dict({ours.get(k, k): x for k, x in state.items()})
    except Exception as error:
        own = {names[key]: tensor.shape for key, tensor in backbone.state_dict().items()}
        lacks = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
        more = [key for key in state if key not in own]
        other = [f"{key} {list(x.shape)}, not {list(own[key])}" for key, x in state.items()
                 if key in own and x.shape != own[key]]
        parts = (("Missing keys", lacks), ("unknown keys", more), ("other shapes", other))
        reason = "; ".join(f"{what} {shorten(some, 3)}" for what, some in parts if some)
        raise UserError(f"{title} does not fit {name}: {reason or first_line(error)}") from error
    backbone.load_state_dict({ours.get(k, k): x for k, x in state.items()})


def load_pretrained(backbone, name, path):
    """Start a backbone from a student file, or an `ExistingNetwork` from its own state_dict.

    Either may be the one dictionary of tensors in a file that holds more, its names may all begin
    alike. With another number of classes the classifier stays as drawn. Returns the weights as the
    file has them, and what was taken, in words. Raises UserError, with nothing loaded, for any
    other file.
    """
    content = read(path)
    if is_checkpoint(content):
        raise UserError(f"{path} is no student file but a run's checkpoint: of one of train.py "
                        f"python predict.py --student {path} --export NEW.pt makes student files")
    content, where = find_weights(content, path)
    state, names = content, names_in_files(backbone, name)
    if is_student_file(content):
        if content["architecture"] != name:
            raise UserError(f"{path} holds a {content['architecture']}, not a {name}")
        state = content["state_dict"]
    elif not isinstance(architecture(name), ExistingNetwork):
        raise UserError(f"{path} is no student file, but {len(content)} tensors "
                        f"({shorten(content, 3)}): {name} starts from student files alone")
    state, before = without_prefix(state, names.values())
    as_drawn = {}
    for key, tensor in backbone.state_dict().items():
        theirs = state.get(names[key]) if key.startswith("classifier.") else None
        if theirs is not None and theirs.shape != tensor.shape:
            as_drawn[names[key]] = tensor
    load_state(backbone, name, {**state, **as_drawn}, path)
    taken = f"{len(names) - len(as_drawn)} of {len(names)} tensors taken"
    taken += f", of the file's {where}" * bool(where) + f", less {before!r}" * bool(before)
    if as_drawn:
        taken += "; the classifier stays as drawn, the file has another number of classes"
    return content, taken
