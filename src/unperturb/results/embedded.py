"""Pictures as addresses that hold them: a page with these asks nothing of the network. And the templates of pages."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results.figures import DPI
from unperturb.results.names import attacker_name, in_figure, norm_name, split_name
from unperturb.results.render import percent
from unperturb.results.sheet import in_markdown

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
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


def flag_page(name: str) -> list[tuple[str, str]]:
    """(head, text) of each paragraph of a flag's page, such as ("What to do", ...), in Markdown; none where there is no
    page."""
    pages = Path(__file__).with_name("flag_pages")  # of an installed package; those of a clone lie among its docs
    page = (pages if pages.exists() else Path(__file__).parents[3] / "docs" / "flags") / f"{name}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.findall(r"^\*\*(.+?)\.\*\* (.+?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return [(head, " ".join(said.split())) for head, said in found]


def templates(*, escape: bool = True) -> Environment:
    """What pages are made of; escape: names from outside cannot be markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "split": split_name, "norm": norm_name, "attacker": attacker_name}
    environment.filters |= {"md": in_markdown, "code": _code}
    return environment


def _code(text: str) -> Markup:
    """Markdown that knows `code` alone, as HTML."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))


def _percent(fraction: float | None) -> str:
    """`98.3`; a dash where there is nothing."""
    return (fraction is not None and percent(fraction, sign="")) or "-"


def _webp(picture: Image, lossless: bool) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=lossless, quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
