"""Pictures as addresses that hold them: a page with these asks nothing of the network. And the templates of pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results.figures import DPI
from unperturb.results.names import attacker_name, in_figure, norm_name, split_name
from unperturb.results.render import percent
from unperturb.results.sheet import in_markdown

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure
    from PIL.Image import Image

CRISP = 64  # pixels of a side, up to which each is shown as a square of its own
LARGEST = 160  # pixels of a side, that a larger picture is reduced to


def image_data(image: Any) -> str:
    """The address of one uint8 `(C, H, W)` image: as it is where each pixel can be seen, else reduced, and as small a
    file as the eye allows."""
    from PIL import Image

    pixels = image.numpy().transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    picture.thumbnail((LARGEST, LARGEST))
    return _webp(picture, lossless=max(picture.size) <= CRISP)


@in_figure
def figure_data(figure: Figure) -> dict[str, Any]:
    """A figure to be shown: `data`, its address, and the `width` and `height` that it is drawn for; twice as fine."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * DPI)
    width, height = (round(DPI * inches) for inches in figure.get_size_inches())
    with Image.open(file) as picture:
        return {"data": _webp(picture.convert("RGB"), lossless=True), "width": width, "height": height}


def templates(*, escape: bool = True) -> Environment:
    """What pages are made of; escape: names from outside cannot be markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "split": split_name, "norm": norm_name, "attacker": attacker_name}
    environment.filters |= {"md": in_markdown}
    return environment


def _percent(fraction: float | None) -> str:
    """`98.3`; a dash where there is nothing."""
    return (fraction is not None and percent(fraction, sign="")) or "-"


def _webp(picture: Image, lossless: bool) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=lossless, quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
