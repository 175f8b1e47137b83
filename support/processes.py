"""Where a run computes: its device, and the processes that torchrun started.

    torchrun --nproc-per-node 8 train.py ...        # one process a GPU, nccl
    torchrun --nproc-per-node 2 train.py --device cpu ...   # gloo

Each process has its part of every batch; the loss is the mean of their objectives. Gradients are
averaged by hand, as one flat vector: DistributedDataParallel lacks the meta step's double backward.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from support.console import UserError, first_line


def pick_device(name, processes):
    """The torch.device of --device; under torchrun each process takes a GPU. Raises UserError."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    kind = best if name == "auto" else name
    if processes.size > 1 and kind not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: under torchrun give cuda (each process takes a GPU of "
                        "its own) or cpu")
    try:
        device = torch.device(kind)
        if device.type == "cuda":
            index = processes.local_rank if processes.size > 1 else device.index or 0
            device = torch.device("cuda", index)
        torch.zeros(1, device=device).item()  # "meta" exists, but computes nothing
    except Exception as error:
        why = (str(error) or "no such device").splitlines()[0][:80]
        raise UserError(f"--device {name} cannot be used here ({why}); try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device):
    if device.type == "cuda":  # PyTorch's default: convolutions in TF32, products not
        is_tf32 = torch.backends.cudnn.conv.fp32_precision != "ieee"
        return torch.cuda.get_device_name(device) + ", convolutions in TF32" * is_tf32
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' * (threads > 1)})"


def be_deterministic():
    """Bit-equal runs on CUDA too. PyTorch would also fill new memory: a third more launches."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


class Processes:
    """The processes of one run: those that torchrun started, or this one alone.

    rank, size, local_rank: this process's number, how many there are, its number on this machine.
    share: (rank, size), which part of the data is this process's.
    average, gather: None for a process that is alone; nothing changes there, not a bit.
    """

    def __init__(self, environment=os.environ):
        self.rank, self.size, self.local_rank = 0, 1, 0
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if environment.keys() >= set(names):  # torchrun started this process
            self.rank, self.size, self.local_rank = (int(environment[name]) for name in names)
        self.share = (self.rank, self.size)
        self.control = self.average = self.gather = None

    def start(self, device):
        """Connect to the others. Flags and hashes go by gloo on the host: no GPU is waited for."""
        if self.size > 1:
            wait = timedelta(minutes=30)  # process 0 may be writing a large checkpoint
            on_gpu = device.type == "cuda"
            backend = dict(backend="nccl", device_id=device) if on_gpu else dict(backend="gloo")
            self._together(dist.init_process_group, timeout=wait, **backend)
            self.control = self._together(dist.new_group, backend="gloo", timeout=wait)
            self.average, self.gather = self._average, self._gather

    def stop(self):
        if self.control is not None:
            dist.destroy_process_group()

    def _together(self, call, *args, **settings):
        """A collective call; it fails where another process has ended."""
        try:
            return call(*args, **settings)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # nccl's DistBackendError is a RuntimeError
            reason = first_line(error)[:60]
            raise UserError(f"another process of this run has ended ({reason}): see above, or its "
                            "machine; the same command with --resume goes on") from None

    def sum(self, tensor):
        """The sum over all processes, a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            self._together(dist.all_reduce, total)
        return total

    def _average(self, vector):
        """The mean over all processes of a flat vector, a new one."""
        return self.sum(vector).div_(self.size)

    def _gather(self, tensor):
        """The processes' tensors of one shape, one after the other: [b, ...] -> [size * b, ...]."""
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        self._together(dist.all_gather, parts, tensor.contiguous())
        return torch.cat(parts)

    def average_in_place(self, tensors):
        """Each tensor becomes its mean over all processes: one all-reduce of one flat vector."""
        if self.size > 1:
            views = [in_memory_order(t) for t in tensors]
            flat = self._average(torch.cat([view.reshape(-1) for view in views]))
            for view, mean in zip(views, flat.split([view.numel() for view in views]), strict=True):
                view.copy_(mean.view(view.shape))

    def broadcast(self, module):
        """Parameters and buffers of process 0 everywhere; all-reduces then keep them bit-equal."""
        if self.size > 1:
            for t in [*module.parameters(), *module.buffers()]:
                self._together(dist.broadcast, t.data, 0)

    def be_alone(self, flag):
        """Raises UserError under torchrun, for a flag whose work one process does."""
        if self.size > 1:
            raise UserError(f"{flag} wants one process: leave torchrun out")

    def largest(self, flag):
        """The largest of the processes' whole numbers: whether any wants to stop, save, ..."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag])
        self._together(dist.all_reduce, flags, op=dist.ReduceOp.MAX, group=self.control)
        return int(flags)

    def all_equal(self, value):
        """Whether all processes have the same `value` (bytes, text, ...)."""
        return all(v == value for v in self.gather_objects(value))

    def gather_objects(self, value):
        """The list of the processes' values, anything that pickles, in order of rank."""
        values = [value] * self.size
        if self.size > 1:
            self._together(dist.all_gather_object, values, value, group=self.control)
        return values


def in_memory_order(t):
    """A view with the axes in the order of memory: flattening a dense one copies nothing."""
    return t.permute(sorted(range(t.dim()), key=lambda axis: -t.stride(axis)))
