"""A step captured as a CUDA graph: one launch instead of one an operation."""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from support.console import UserError, first_line, warn


def check_graphs(args, processes):
    """Raises UserError where --cuda-graph cannot be had at all."""
    if args.cuda_graph and args.device.type != "cuda":
        raise UserError(f"--cuda-graph wants a CUDA device, and this is {args.device}: "
                        "leave it out")
    if args.cuda_graph and processes.size > 1:
        raise UserError("--cuda-graph has not been seen with several processes: leave it out")


class NotCaptured(Exception):
    """PyTorch refuses to capture something; nothing was computed."""


class CUDAGraphs:
    """A function of tensors, or of tuples and lists of them,
    captured for each batch size and each phase().

    For each of these three calls run eagerly: libraries choose algorithms, optimizers make buffers.
    The fourth is captured; it and all later ones replay the same kernels on the same memory.
    So what changes from call to call is an input, or a tensor changed in place, as Run.lr is.
    Memory made outside must not be freed while graphs use it.
    Outputs are good until the next call, of whatever size: graphs share their memory,
    and each writes before it reads.
    A function that cannot be captured stays eager, with a warning.
    """

    WARM_UP = 3

    def __init__(self, function, phase=lambda: None):
        self.function, self.phase, self.calls, self.graphs = function, phase, {}, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.is_eager = False

    def __call__(self, *inputs):
        tensors, form = tree_flatten(inputs)  # None, where there is no bank, is among them
        kind = len(tensors[0]), self.phase()
        self.calls[kind] = self.calls.get(kind, 0) + 1
        # on the capturing stream, which autograd stays on
        if self.is_eager or self.calls[kind] <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if kind not in self.graphs:
            own = [x.clone() if torch.is_tensor(x) else x for x in tensors]
            try:
                self.graphs[kind] = (own, *self._capture(tree_unflatten(own, form)))
            except NotCaptured as error:
                name = getattr(self.function, "__name__", None) or self.function.func.__name__
                warn(f"warning    --cuda-graph cannot capture {name.strip('_')} ({error}): "
                     "it stays as it is")
                self.is_eager = True
                return self(*inputs)
        own, graph, outputs = self.graphs[kind]
        for captured, given in zip(own, tensors, strict=True):
            if torch.is_tensor(given):
                captured.copy_(given)
        graph.replay()
        return outputs

    def _capture(self, inputs):
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins streamed images may allocate meanwhile
        settings = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.graph(graph, **settings):
                outputs = self.function(*inputs)
        except RuntimeError as error:
            error = error.__context__ or error  # leaving the capture may fail too: the first one
            if "captur" not in str(error).lower():  # an error of the program, or too little memory
                raise error from None
            raise NotCaptured(first_line(error)) from None
        return graph, outputs


def draws_random_numbers(function, device):
    """Whether function() uses the device's random generator, as dropout and stochastic depth do."""
    on_gpu = device.type == "cuda"
    state = (lambda: torch.cuda.get_rng_state(device)) if on_gpu else torch.get_rng_state
    with torch.random.fork_rng([device] if on_gpu else []):
        before = state()
        function()
        return not torch.equal(before, state())
