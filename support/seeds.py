"""Everything random is a function of a key, such as "SEED,EPOCH": no generator's state is saved."""

import hashlib

import torch


def seed(key):
    """A key, any text -> 32 bits of its SHA-256, all that PyTorch's CPU generator takes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def seed_own(number, device):
    """Seeds PyTorch's own generators of the CPU and of `device`, which dropout draws from.

    torch.manual_seed seeds those of all devices, and asks for each kind that there might be.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def generator(key):
    """A torch.Generator on the CPU, seeded by the key: those of neighbouring keys are unrelated."""
    return torch.Generator().manual_seed(seed(key))
