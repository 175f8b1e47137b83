"""Where a run computes: its device, its CUDA graphs, and the processes that torchrun started.

    torchrun --nproc-per-node 8 train.py ...        # one process a GPU, nccl
    torchrun --nproc-per-node 2 train.py --device cpu ...   # gloo

Each process has its part of every batch; the loss is the mean over processes of each one's objective. Gradients are
averaged here, by hand, as one flat vector: DistributedDataParallel hooks into the backward pass and has no double
backward, which the meta step needs, and one visible average serves both steps.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can mend; the program prints its one line and exits with status 1."""


def pick_device(name, processes):
    """The torch.device of --device; under torchrun on CUDA each process of a machine takes a GPU of its own."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if processes.size > 1 and kind not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: under torchrun give cuda (each process takes a GPU of its own) or cpu")
    try:
        device = torch.device(kind)
        if device.type == "cuda":
            index = processes.local_rank if processes.size > 1 else device.index or 0
            device = torch.device("cuda", index)
        torch.zeros(1, device=device).item()                 # "meta" exists, but computes nothing
    except Exception as error:
        reason = (str(error) or "no such device").splitlines()[0][:80]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device):
    if device.type == "cuda":                              # PyTorch's default: convolutions in TF32, products not
        tf32 = ", convolutions in TF32" if torch.backends.cudnn.allow_tf32 else ""
        return torch.cuda.get_device_name(device) + tf32
    return f"{device} ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"


def check_graphs(args, processes):
    """Whether --cuda-graph can be had at all."""
    if args.cuda_graph and args.device.type != "cuda":
        raise UserError(f"--cuda-graph wants a CUDA device, and this is {args.device}: leave it out")
    if args.cuda_graph and processes.size > 1:
        raise UserError("--cuda-graph has not been seen with several processes: leave it out")


def be_deterministic():
    """Bit-equal runs on CUDA too. PyTorch would also fill new memory: a third more launches, the same results."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


# ---------------------------------------------------------------- several processes

class Processes:
    """The processes of one run: those that torchrun started, or this one alone.

    rank, size, local_rank: this process's number, how many there are, its number on this machine.
    `average` and `gather` are None for a process that is alone: nothing changes there, not a bit.
    """

    def __init__(self, environment=os.environ):
        started = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys()
        self.rank, self.size, self.local_rank = (int(environment[k]) if started else alone for k, alone in
                                                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.part, self.control = (self.rank, self.size), None
        self.average = self.gather = None

    def start(self, device):
        """Connect to the others. Flags and hashes go through gloo on the host, so that no GPU is waited for."""
        if self.size > 1:
            wait = timedelta(minutes=30)                     # process 0 may be writing a large checkpoint
            on_gpu = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
            self._together(dist.init_process_group, timeout=wait, **on_gpu)
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
        except (RuntimeError, ValueError) as error:          # gloo: RuntimeError; nccl: DistBackendError, one of them
            raise UserError(f"another process of this run has ended ({str(error).splitlines()[0][:60]}): see above, or "
                            "its machine; the same command with --resume goes on") from None

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
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._together(dist.all_gather, parts, tensor.contiguous())
        return torch.cat(parts)

    def average_in_place(self, tensors):
        """Each tensor becomes its mean over all processes: one all-reduce of one flat vector."""
        if self.size > 1:
            flat = self._average(torch.cat([in_memory_order(t).reshape(-1) for t in tensors]))
            for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                in_memory_order(t).copy_(mean.view(in_memory_order(t).shape))

    def broadcast(self, module):
        """Parameters and buffers of process 0 everywhere, once; later all-reduces give all processes the same bits."""
        if self.size > 1:
            for t in [*module.parameters(), *module.buffers()]:
                self._together(dist.broadcast, t.data, 0)

    def be_alone(self, flag):
        """Raises UserError under torchrun, for a flag whose work one process does."""
        if self.size > 1:
            raise UserError(f"{flag} wants one process: leave torchrun out")

    def largest(self, flag):
        """The largest of the processes' whole numbers `flag`: whether any wants to stop, save, ..."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag])
        self._together(dist.all_reduce, flags, op=dist.ReduceOp.MAX, group=self.control)
        return int(flags)

    def all_equal(self, value):
        """Whether all processes have the same `value` (bytes, text, ...)."""
        return all(v == value for v in self.gather_objects(value))

    def gather_objects(self, value):
        """The processes' values, anything that pickles, in order of rank: a list, the same everywhere."""
        values = [value] * self.size
        if self.size > 1:
            self._together(dist.all_gather_object, values, value, group=self.control)
        return values


def in_memory_order(t):
    """A view with the axes in the order of memory, so that flattening a dense tensor copies nothing."""
    return t.permute(sorted(range(t.dim()), key=lambda axis: -t.stride(axis)))


# ---------------------------------------------------------------- CUDA graphs

class CUDAGraphs:
    """A function of tensors, captured as a CUDA graph for each batch size: one launch instead of one an operation.

    The first three calls of each batch size run eagerly: libraries choose algorithms, optimizers make their buffers.
    The fourth is captured, and it and all later ones replay the same kernels on the same memory. So whatever changes
    from call to call is an input, or a tensor changed in place, as Run.lr is. Memory made outside a graph must not be
    freed while graphs use it. Outputs are good until the next call, of whatever size: graphs of several sizes share
    their memory, and each writes before it reads.
    """

    WARM_UP = 3

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, {}, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs):
        size = len(inputs[0])
        self.calls[size] = self.calls.get(size, 0) + 1
        if self.calls[size] <= self.WARM_UP:               # on the capturing stream: autograd stays on its stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if size not in self.graphs:
            self.graphs[size] = self._capture([x.clone() for x in inputs])
        graph, captured_inputs, outputs = self.graphs[size]
        for captured, given in zip(captured_inputs, inputs, strict=True):
            captured.copy_(given)
        graph.replay()
        return outputs

    def _capture(self, inputs):
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that pins streamed images may allocate meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
        except RuntimeError as error:
            error = error.__context__ or error             # where leaving the capture fails too, the first one counts
            if "captur" not in str(error).lower():         # an error of the program, or too little memory
                raise error from None
            raise UserError(f"--cuda-graph cannot capture this step ({str(error).splitlines()[0][:120]}): "
                            "leave it out") from None
        return graph, inputs, outputs


def draws_random_numbers(function, device):
    """Whether function() uses the device's random generator, as dropout and stochastic depth do."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = (lambda: torch.cuda.get_rng_state(device)) if device.type == "cuda" else torch.get_rng_state
        before = state()
        function()
        return not torch.equal(before, state())
