"""Files that are whole or not there at all, checkpoints that know when they are damaged, and signals that wait.

Beside the algorithm's files so that train.py's loop stays the algorithm. Standard library and torch only.

A checkpoint is what torch.save writes, followed by the SHA-256 of it (32 bytes, which torch.load passes
over). It is loaded with weights_only=True: no pickled code of whoever wrote the file is ever run.
"""

import contextlib
import hashlib
import io
import os
import signal
from pathlib import Path

import torch

DIGEST = hashlib.sha256().digest_size


class CheckpointError(Exception):
    """A file that cannot be written or read; the message is one line that says which, why and what to do."""


def write(path, content, keep=None):
    """Put bytes into path so that a reader finds the old file or the new one, whole, even after a power cut.

    keep: the name under which the previous file stays. Raises CheckpointError, with the old file in place.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):               # on a read-only file system not even this
            temporary.unlink()
        raise CheckpointError(f"cannot write {path} ({error.strerror}): make room for {len(content) / 2 ** 20:.1f} MiB or "
                              "give another --out-dir; what was there before is untouched") from None


def save(path, state, keep=None):
    """Write a dictionary of tensors and plain values as a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write(path, content + hashlib.sha256(content).digest(), keep)


def load(path, device="cpu"):
    """The dictionary that `save` wrote. Raises CheckpointError for anything else, damaged files included."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from None
    content, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this program")
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:                       # torch names no class for files that it does not understand
        raise CheckpointError(f"{path} is no checkpoint of this program ({(str(error) or repr(error)).splitlines()[0][:60]})") from None


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 ask for an end after the present step; a second one ends the process at once."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")}
        return self

    def _ask(self, number, frame):
        self.name = signal.Signals(number).name
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
