"""What the page shows as HTML of its own: how far a draw is. All text in it is escaped; HTML is made nowhere else."""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ella_kd.app.web.grids import FOLDER, Cells
from ella_kd.app.web.session import Saved, Step
from ella_kd.cli import COLUMNS

CSS = """
.ella-status { padding: .25rem .1rem; min-height: 1.6rem; }
.ella-bar { height: .45rem; border-radius: .25rem; background: var(--neutral-200); overflow: hidden; }
.dark .ella-bar { background: var(--neutral-700); }
.ella-bar div { height: 100%; background: var(--color-accent); transition: width .15s linear; }
.ella-status p { margin: .35rem 0; font-size: var(--text-sm); }
.ella-previews { display: flex; flex-wrap: wrap; gap: .4rem; }
.ella-previews img { width: min(100%, 12rem); flex: 1 1 6rem; max-width: 16rem; border-radius: .3rem; }
.ella-bad { border-left: .25rem solid var(--error-border-color, #b91c1c); padding-left: .6rem;
  overflow-wrap: anywhere; }
.ella-note { opacity: .75; overflow-wrap: anywhere; }
#tokens { font-size: var(--text-sm); opacity: .75; text-align: right; margin: -.7rem 0; }
#status .error, #grid-status .error { display: none; }  /* a cancelled event's; ours are said in words */
#title h2, #title p { margin: 0; }
.ella-row button { align-self: center; }
#gallery .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
#gallery .caption-label { white-space: normal; max-width: 100%; font-size: var(--text-xs); padding: .1rem .35rem; }
@media (max-width: 600px) { #gallery .caption-label { font-size: .6rem; line-height: 1.1; padding: .1rem .2rem; } }
#studio { display: grid; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) {  /* what is drawn stands beside the prompt and the options, else between them */
  #studio { grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); grid-template-rows: auto 1fr; }
  #drawn { grid-column: 2; grid-row: 1 / span 2; }
}
"""
# The miniature's pictures are 48 px: enlarged, their pixels are shown as they are.
PIXELATED = "#gallery img, .ella-previews img { image-rendering: pixelated; }"


def escaped(text: object) -> str:
    """Text as HTML that says it, whatever a template would make of its marks."""
    return html.escape(str(text)).replace("$", "&#36;").replace("{", "&#123;").replace("`", "&#96;")


def going(news: Step) -> str:
    """A bar, words, and what the denoised looks like."""
    words = [f"step {news.step} of {news.steps}", f"{news.done} of {news.total} done"]
    words += [] if news.left is None else [f"{seconds(news.left)} left"]
    images = "".join(f'<img alt="preview" src="{data(each)}">' for each in news.preview)
    return _status(news.share, " · ".join(words), f'<div class="ella-previews">{images}</div>')


def arrived(saved: Sequence[Saved], total: int, folder: str, took: float) -> str:
    notes = dict.fromkeys(note for each in saved for note in each.told)
    more = "".join(f'<p class="ella-note">{escaped(note)}</p>' for note in notes)
    where = f" in {seconds(took)}: {folder}" if len(saved) == total else ""
    return _status(len(saved) / total, f"{len(saved)} of {total} done{where}", more)


def cells(news: Cells) -> str:
    """How far a grid is, and the way to its page, which finds new pictures by itself."""
    words = [f"{news.done} of {news.total} pictures"] + [f"{news.failed} failed"] * bool(news.failed)
    words += [f"{seconds(news.left)} left"] if news.left is not None and news.done < news.total else []
    return _status(news.done / news.total, " · ".join(words), links([news.page]))


def links(pages: Sequence[Path]) -> str:
    """The ways to grids' pages."""
    names = [page.parent.name for page in pages]
    return "".join(f'<p><a href="{FOLDER}/{quote(name)}/index.html" target="_blank">{escaped(name)}</a></p>'
                   for name in names)


def failed(message: str) -> str:
    return f'<div class="ella-status"><p class="ella-bad" role="alert">{escaped(message)}</p></div>'


def said(text: str) -> str:
    return f'<div class="ella-status"><p>{escaped(text)}</p></div>'


def caption(saved: Saved, compared: bool) -> str:
    """Under a picture of the gallery, which shows it as text."""
    seed = f"seed {saved.request.seed}"
    return f"{COLUMNS[saved.request.mode]}, {seed}" if compared else seed


def seconds(number: float) -> str:
    whole = round(number)
    return f"{number:.1f} s" if number < 9.95 else f"{whole} s" if whole < 120 else f"{round(whole / 60)} min"


def data(image: Image.Image) -> str:
    """A picture as an address of its own."""
    png = BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _status(share: float, words: str, more: str) -> str:
    return (f'<div class="ella-status"><div class="ella-bar" role="progressbar" aria-valuenow="{100 * share:.0f}">'
            f'<div style="width:{100 * share:.1f}%"></div></div><p>{escaped(words)}</p>{more}</div>')
