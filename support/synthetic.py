"""A data set of drawn shapes, for a first run without network or disk."""

from math import tau

import torch

SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("shaded", "striped", "checked", "dotted")


MOST = 10_000  # training images


def synthetic(size, count=MOST):
    """(20 classes, images uint8 [count, size, size, 3], labels, 2000 test images, test labels)."""
    generator = torch.Generator().manual_seed(20)
    classes = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    labels, test_labels = (torch.arange(n) % len(classes) for n in (MOST, 2_000))
    draw = lambda some: torch.cat([paint(chunk, size, generator) for chunk in some.split(500)])
    images, test_images = draw(labels), draw(test_labels)
    return classes, images[:count], labels[:count], test_images, test_labels


def paint(labels, size, generator):
    """An image a label, uint8 [b, size, size, 3]: a shape of two colours on a third, and noise.

    Place, scale and two rotations are drawn anew for each image. All shapes have the same area, and
    colours spread evenly about mid-gray, so that the classes do not differ in their mean colour.
    """
    b = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(b, *(shape or (1, 1)), generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x = axis - uniform(-0.2, 0.2)  # [b, 1, size]
    y = axis[:, None] - uniform(-0.2, 0.2)  # [b, size, 1]

    # The shape, in its own frame: its signed distance, negative inside; each shape has area 2.
    angle, radius = uniform(0, tau), uniform(0.55, 0.8)
    u = (x * angle.cos() + y * angle.sin()) / radius  # [b, size, size]
    v = (y * angle.cos() - x * angle.sin()) / radius
    r, s, t = torch.hypot(u, v), u.abs(), v.abs()
    distances = torch.stack([  # in the order of SHAPES
        r - 0.798,
        torch.maximum(s, t) - 0.707,
        torch.maximum(-v, 0.866 * s + 0.5 * v) - 0.620,
        (r - 0.75).abs() - 0.212,
        torch.minimum(torch.maximum(s - 0.98, t - 0.3), torch.maximum(t - 0.98, s - 0.3)),
    ])  # [5, b, size, size]
    distance = distances[labels // len(TEXTURES), torch.arange(b)]  # [b, size, size]
    inside = (0.5 - distance * radius * size / 2).clamp(0, 1)  # edges one pixel wide

    # The texture, in a frame of its own: the share of the first colour.
    angle, wave = uniform(0, tau), uniform(14, 18)
    p = wave * (x * angle.cos() + y * angle.sin()) + uniform(0, tau)  # phase, [b, size, size]
    q = wave * (y * angle.cos() - x * angle.sin()) + uniform(0, tau)
    p, q = p.sin(), q.sin()
    shares = [0.5 + 0.5 * u, 0.5 + 2 * p, 0.5 + 4 * p * q, 2 * (p + q) - 1]  # as TEXTURES
    shares = torch.stack(shares).clamp(0, 1)  # [4, b, size, size]
    share = shares[labels % len(TEXTURES), torch.arange(b)]  # [b, size, size]

    # A ground between two colours that differ from it in each channel, one darker, one lighter. It
    # is mid-gray: far from the mean, batch norm's running statistics lag behind, accuracy jumps.
    side = torch.where(uniform(0, 1, 3, 1, 1) < 0.5, -1, 1)  # [b, 3, 1, 1]
    first, second = (0.5 + sign * side * uniform(0.15, 0.5, 3, 1, 1) for sign in (1, -1))
    ground = uniform(0.35, 0.65, 3, 1, 1)
    share, inside = share[:, None], inside[:, None]  # [b, 1, size, size]
    shape = share * first + (1 - share) * second  # [b, 3, size, size]
    image = inside * shape + (1 - inside) * ground
    image += 0.05 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
