"""--amp bf16: autocast, less what bfloat16 makes slower."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def mixed_precision(args):
    """In it matrix products and convolutions compute in bfloat16, if args.amp is "bf16"."""
    enabled = args.amp == "bf16"
    on_cpu = enabled and args.device.type == "cpu"
    with (torch.autocast(args.device.type, torch.bfloat16, enabled=enabled),
          DepthwiseInFloat32() if on_cpu else contextlib.nullcontext()):
        yield


class DepthwiseInFloat32(TorchFunctionMode):
    """Under autocast on the CPU, depthwise convolutions compute in float32 and give bfloat16.

    In bfloat16 the backward pass of those that stride, or are larger than 3x3, takes up to 20
    times as long (docs/SPEED.md).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        depthwise = function is torch.conv2d and len(args) > 1 and args[1].shape[1] == 1
        if not depthwise or not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        images, *others = args  # the second: weight [C', 1, k, k]
        with torch.autocast("cpu", enabled=False):
            return function(images.float(), *others, **kwargs).bfloat16()
