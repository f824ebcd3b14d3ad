"""visualize: where each head of each layer looks, whom the gates believe, and what each depth would have said."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.image import imsave
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from torch import Tensor

from ..attend_rectify import Rectified
from ..models.digits import IMAGE_SIZE, DigitNet, MapGeometry
from . import data, images
from .figures import draw_attention, layer_titles, overlays
from .nets import Net, load_run
from .pages import escaped, picture, write_page
from .training import Identity

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def run(options: argparse.Namespace) -> None:
    """Draws as __main__ parsed it. Raises ValueError and FileNotFoundError."""
    device = torch.device(options.device)
    model, net, identity = load_run(options.run, device)
    if not net.is_attentive:
        raise ValueError(f"{options.run} is a run of {net.model} without attention: there are no masks to see")
    if options.images:
        pixels, labels = own_images(options.images, net, options.count), None
    else:
        pixels, labels = test_images(net, identity, options.count, options.data_root, options.distractors)
    with torch.no_grad():
        details = model(prepared(pixels, net, identity).to(device), return_details=True)
    geometries = model.attended_maps if isinstance(model, DigitNet) else None
    classes, out = identity.get("classes"), Path(options.out)
    draw_attention(out / "attention.png", pixels, labels, details, geometries, classes)
    write_attention(out / "attention.html", pixels, labels, details, geometries, classes, f"Attention of {net.model}")
    console = Console(highlight=False)
    console.print(f"  {out / 'attention.png'}\n  {out / 'attention.html'}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- images


def own_images(paths: Sequence[str], net: Net, count: int) -> Tensor:
    """Up to `count` pictures, of files and of folders, as the net takes them: [N, 1 or 3, H, W] in [0, 1].

    The shorter side is resized and the middle cut out. Raises FileNotFoundError and ValueError naming the file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} is missing: --images takes files and folders of pictures")
    if not files:
        raise FileNotFoundError(f"{', '.join(paths)} holds no picture ({', '.join(_SUFFIXES)})")
    is_digit = net.model == "digitnet"
    size = IMAGE_SIZE if is_digit else net.image_size
    found = []
    for file in files[:count]:
        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if is_digit else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is no picture that could be read: {error}") from None
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in image.size)
        values = np.array(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
        found.append(torch.from_numpy(values.reshape(size, size, -1)).movedim(2, 0))
    return torch.stack(found)


def test_images(
    net: Net, identity: Identity, count: int, root: str | Path, distractors: int = 8
) -> tuple[Tensor, Tensor]:
    """The first images of the test set that a run was tested on, as own_images returns them, and their labels."""
    cpu = torch.device("cpu")
    if net.model == "digitnet":
        clutter = data.Clutter(data.load(identity["data"], root=root).test, distractors)
        return next(clutter.test_batches(count))
    source = images.load(identity["data"], cpu, root=root, size=net.image_size, workers=0)
    pixels, labels = next(source.test_batches(count))
    return ((pixels * source.std + source.mean) / 255).clamp(0, 1), labels


def prepared(pixels: Tensor, net: Net, identity: Identity) -> Tensor:
    """Images in [0, 1] as a run's net was trained on them."""
    if net.model == "digitnet":
        return pixels
    mean, std = (torch.tensor(identity[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (255 * pixels - mean) / std


# ---------------------------------------------------------------------------------------------- the page

_STYLE = """
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.stack { position: relative; width: 112px; height: 112px; background: #000; }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.stack img + img { opacity: var(--masks); }
figure { margin: 0; } figcaption { font-size: 12px; color: #444; }
.layer { border-left: 2px solid #ddd; padding-left: .7rem; } .layer .row { gap: .35rem; }
.bar { display: inline-block; height: .6rem; background: #4878a8; vertical-align: middle; }
label { position: sticky; top: 0; background: #fff; display: block; padding: .4rem 0; z-index: 1; }
"""

_SLIDER = """<label>masks <input type="range" min="0" max="1" step="0.05" value="0.85"
oninput="document.body.style.setProperty('--masks', this.value)"></label>
<style>body { --masks: 0.85; }</style>"""


def write_attention(
    path: str | Path,
    pixels: Tensor,
    labels: Sequence[object] | None,
    details: Rectified,
    geometries: Sequence[MapGeometry] | None = None,
    classes: Sequence[str] | None = None,
    title: str = "Attention",
) -> None:
    """Writes an HTML page of what draw_attention draws, and more: what each depth would have predicted and how surely.

    Takes what draw_attention takes, of any model that returns Rectified: AttendRectify, WARN, DigitNet. The page is one
    file, fetches nothing and opens without a server.
    """
    laid, titles = overlays(details.masks, tuple(pixels.shape[2:]), geometries), layer_titles(details, geometries)
    shares, guesses = details.hypotheses.float().softmax(dim=2).max(dim=2)
    gammas = details.global_gates.float().tolist()
    predictions = details.output.argmax(dim=1).tolist()

    def name(label: int) -> str:
        return str(label) if classes is None else classes[label]

    parts = [
        '<p class="note">Each picture of a layer shows where one head looks, coloured up to the mask\'s own maximum. '
        "g: how much the head counts in its layer. γ: how much the layer's hypothesis counts in the answer. "
        "→: what the hypothesis says alone, and how sure it is.</p>",
        _SLIDER,
    ]
    for row in range(len(pixels)):
        image = _png(np.broadcast_to(pixels[row].movedim(0, 2).cpu().numpy(), (*pixels.shape[2:], 3)))
        said = f"→ {escaped(name(predictions[row]))}"
        if labels is not None:
            label = int(labels[row])
            wrong = "" if label == predictions[row] else ' class="wrong"'
            said = f"<span{wrong}>{escaped(name(label))} {said}</span>"
        own = _depth("the network's own", name(int(guesses[row, -1])), shares[row, -1], gammas[row][-1])
        parts.append(f'<h2>{said}</h2><div class="row"><div>{_stack(image)}{own}</div>')
        for layer, text in enumerate(titles):
            heads = "".join(
                f"<figure>{_stack(image, _coloured(laid[layer][row, head].numpy()))}"
                f"<figcaption>g {float(gate):.2f}</figcaption></figure>"
                for head, gate in enumerate(details.head_gates[layer][row])
            )
            depth = _depth(text, name(int(guesses[row, layer])), shares[row, layer], gammas[row][layer])
            parts.append(f'<div class="layer">{depth}<div class="row">{heads}</div></div>')
        parts.append("</div>")
    write_page(path, title, "\n".join(parts), _STYLE)


def _depth(text: str, guess: str, share: Tensor, gamma: float) -> str:
    bar = f'<span class="bar" style="width: {80 * gamma:.0f}px"></span>'
    return f"<div>{escaped(text)}<br>→ {escaped(guess)} ({100 * float(share):.0f} %)<br>γ {gamma:.2f} {bar}</div>"


def _stack(*pngs: bytes) -> str:
    return f'<div class="stack">{"".join(map(picture, pngs))}</div>'


def _coloured(mask: np.ndarray) -> bytes:
    colours = colormaps["inferno"]((mask + 0.3) / 1.3)
    colours[..., 3] = mask**0.5
    return _png(colours)


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(values), format="png")
    return buffer.getvalue()
