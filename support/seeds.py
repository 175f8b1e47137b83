"""Everything random is a function of a key, such as "SEED,EPOCH": no generator's state is saved."""

import hashlib

import torch


def seed(key):
    """A key, any text -> 32 bits of its SHA-256, all that PyTorch's CPU generator takes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def generator(key):
    """A torch.Generator on the CPU, seeded by the key: those of neighbouring keys are unrelated."""
    return torch.Generator().manual_seed(seed(key))
