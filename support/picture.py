"""The picture of what the matching network learned."""

import io
import math

from PIL import Image, ImageDraw, ImageFont


def matching_picture(matching, names, step):
    """A PNG, bytes, of the mean lambda between stages: a panel for each pair of students.

    matching: lambda as nested lists [N, L, N, L], an epoch's mean (log.jsonl has it). names: of the
    N >= 2 students. step: the epoch's last. Colours run from 0.27 to 0.73, the range of lambda.
    """
    N, L = len(names), len(matching[0])
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    low, high = 1 / (1 + math.e), math.e / (1 + math.e)
    light, dark = (237, 244, 252), (8, 61, 127)
    fonts = {size: ImageFont.load_default(size) for size in (13, 15, 16, 17)}
    title = "Mean layer-matching weight between stages of two students"
    scale = "lightest 0.27: features opposed, 0.50: unrelated, darkest 0.73: alike"
    scale += f"; after step {step:,}"
    captions = [(f"rows: {a + 1} {names[a]}", f"columns: {b + 1} {names[b]}") for a, b in pairs]

    cell, left, top, margin, columns = 72, 96, 92, 24, math.ceil(len(pairs) ** 0.5)
    length = lambda text, size: math.ceil(fonts[size].getlength(text))
    texts = [length(line, 13) for caption in captions for line in caption]
    width = left + margin + max(L * cell, *texts)
    height = top + L * cell + margin
    whole = max(columns * width, 2 * 16 + max(length(title, 17), length(scale, 13)))
    picture = Image.new("RGB", (whole, 64 + -(-len(pairs) // columns) * height), "white")
    draw = ImageDraw.Draw(picture)

    def write(x, y, text, size, fill="black", anchor="mm"):
        draw.text((x, y), text, fill=fill, font=fonts[size], anchor=anchor)

    write(16, 22, title, 17, anchor="lm")
    write(16, 46, scale, 13, fill="dimgray", anchor="lm")
    for i, ((a, b), caption) in enumerate(zip(pairs, captions, strict=True)):
        x0, y0 = left + i % columns * width, 64 + top + i // columns * height
        for line, y in zip(caption, (y0 - 66, y0 - 48), strict=True):
            write(x0, y, line, 13, anchor="lm")
        for row in range(L):
            write(x0 - 46, y0 + (row + 0.5) * cell, f"stage {row + 1}", 15)
            write(x0 + (row + 0.5) * cell, y0 - 20, f"stage {row + 1}", 15)
            for column in range(L):
                value = matching[a][row][b][column]
                depth = (value - low) / (high - low)  # 0 lightest, 1 darkest
                x, y = x0 + column * cell, y0 + row * cell
                fill = tuple(round(c + depth * (d - c)) for c, d in zip(light, dark, strict=True))
                draw.rectangle((x, y, x + cell - 3, y + cell - 3), fill=fill)
                ink = "white" if depth > 0.7 else "black"
                write(x + cell / 2 - 2, y + cell / 2 - 2, f"{value:.3f}", 16, ink)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
