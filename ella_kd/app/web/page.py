"""The page in gradio: inputs, buttons, and which function of the studio each calls."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from ella_kd.app.web import grids, view
from ella_kd.app.web.form import CFG_PP, COMPARE, LIMITS, MORE, RANDOM, Form, Limits, filled
from ella_kd.app.web.session import Saved, Studio, message_of
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request
from ella_kd.samplers import SAMPLERS, SCHEDULES
from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES, RANGE_SAMPLERS

LOCAL = ("127.0.0.1", "localhost")
ONE = {"concurrency_id": "model", "concurrency_limit": 1}  # of everything that draws
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
MODES = {"ELLA flexible": "flexible", "ELLA fixed": "fixed", "plain SD": "clip"}
EXAMPLE = "The scene is set in a deep forest. A striped red heart sits in the top left corner."  # the miniature's world
Update = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A page that is being served."""

    url: str
    studio: Studio
    blocks: gr.Blocks
    cache: tempfile.TemporaryDirectory[str]

    def wait(self) -> None:
        """Until Ctrl-C."""
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        self.blocks.close(verbose=False)
        self.cache.cleanup()


def serve(pipeline: Pipeline, *, out: str | Path = "out", models_dir: str | Path | None = None,
          upsample: Callable[[str], str] | None = None, host: str = LOCAL[0], port: int | None = None,
          limits: Limits = LIMITS, batch_size: int = 8, queue: int = 20, block: bool = True) -> Served:
    """Serve the page; `ella_kd.app.web.serve` tells the rest. queue: how many draws may wait. port None: the first
    free one from 7860 on. Nothing but the folder out is read for anyone, and nothing is sent anywhere."""
    studio = Studio(pipeline, out, models_dir, upsample=upsample, limits=limits, batch_size=batch_size)
    cache = tempfile.TemporaryDirectory(prefix="ella_kd-web-")  # gradio's own is shared with all its other pages
    os.environ["GRADIO_TEMP_DIR"] = cache.name
    blocks = Page(studio).blocks().queue(max_size=queue, default_concurrency_limit=8)
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL])] if host in LOCAL else []
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app, url, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        theme=theme, css=view.CSS + view.PIXELATED * (pipeline.size < 256), max_file_size="20mb",
        allowed_paths=[str(Path(out).resolve())], ssr_mode=False, enable_monitoring=False, run_history=False,
        mcp_server=False, footer_links=["api", "settings"], app_kwargs={"middleware": hosts})
    folder = StaticFiles(directory=studio.out / grids.FOLDER, html=True, check_dir=False)
    app.router.routes.insert(0, Mount(f"/{grids.FOLDER}", folder))  # before gradio's own, which take any name
    served = Served(url, studio, blocks, cache)
    if block:
        print(f"The page is at {url} (Ctrl-C ends it); pictures go to {out}", flush=True)
        served.wait()
    return served


class Page:
    """The inputs by the names of `Form`, and what their buttons do."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.inputs: dict[str, Any] = {}

    def blocks(self) -> gr.Blocks:
        title = f"ella_kd: {self.studio.pipeline.name}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
            with gr.Row(elem_id="head"):
                gr.Markdown(f"## ella_kd\n{self._what()}", elem_id="title")
                dark = gr.Button("Light / dark", size="sm", scale=0, min_width=110, elem_id="dark")
            dark.click(None, js="() => { document.body.classList.toggle('dark'); }", api_visibility="private")
            with gr.Tabs() as tabs:
                with gr.Tab("Draw", id="draw"), gr.Row(elem_id="studio"):  # laid out by view.CSS
                    with gr.Column(min_width=280, elem_id="asked"):
                        buttons = self._prompt()
                    with gr.Column(min_width=280, elem_id="drawn"):
                        right = self._drawn()
                    with gr.Column(min_width=280, elem_id="options"):
                        buttons |= self._options()
                with gr.Tab("Settings of a picture", id="settings"):
                    self._settings(tabs)
                with gr.Tab("Grid", id="grid"):
                    links = self._grid()
                blocks.load(lambda: view.links(grids.known(self.studio)), None, links, **QUIET)
            self._wire(blocks, buttons, right)
            gr.api(self.api_draw, api_name="draw", **ONE)
        return blocks

    def _what(self) -> str:
        pipeline = self.studio.pipeline
        return (f"{view.escaped(pipeline.name)}, {pipeline.size} px, "
                f"{str(pipeline.dtype).removeprefix('torch.')} on {pipeline.device}")

    @property
    def first(self) -> Form:
        """What the inputs hold before anybody says anything."""
        if self.studio.pipeline.name == "miniature":
            return Form(prompt=EXAMPLE, scale=3.0)  # the scale of its published numbers
        return Form()

    def _prompt(self) -> dict[str, Any]:
        studio, add, first = self.studio, self.inputs, self.first
        buttons: dict[str, Any] = {}
        add["prompt"] = gr.Textbox(first.prompt, label="Prompt", lines=4, max_lines=12, elem_id="prompt",
                                   placeholder="Long, dense prompts are welcome: what is where, in which colour ...")
        buttons["tokens"] = gr.HTML(studio.tokens(first.prompt), elem_id="tokens")
        add["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=6, elem_id="negative")
        with gr.Row():
            buttons["draw"] = gr.Button("Draw", variant="primary", elem_id="draw-button", min_width=120)
            buttons["cancel"] = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=120)
            buttons["longer"] = gr.Button("Longer prompt", elem_id="longer", min_width=120,
                                          visible=studio.upsample is not None)
        return buttons

    def _options(self) -> dict[str, Any]:
        studio, add, first = self.studio, self.inputs, self.first
        side = {"precision": 0, "minimum": 0, "maximum": studio.limits.side, "step": studio.pipeline.vae.factor,
                "min_width": 100}
        names = [name for name in (*SAMPLERS, *RANGE_SAMPLERS)
                 if not (name.endswith(CFG_PP) and name.removesuffix(CFG_PP) in SAMPLERS)]
        modes = [(label, mode) for label, mode in MODES.items() if mode in studio.modes]
        buttons: dict[str, Any] = {}
        add["mode"] = gr.Radio([*modes, *([("compare", COMPARE)] if len(modes) > 1 else [])],
                               value=modes[0][1], label="Mode", elem_id="mode",
                               info="compare: all of them from the same seeds, side by side")
        with gr.Row():
            add["sampler"] = gr.Dropdown(names, value=first.sampler, label="Sampler", elem_id="sampler", min_width=140)
            add["schedule"] = gr.Dropdown([*SCHEDULES, *COMPATIBLE_SCHEDULES], value=first.schedule, label="Schedule",
                                          elem_id="schedule", min_width=140)
            add["steps"] = gr.Slider(1, studio.limits.steps, first.steps, step=1, label="Steps", elem_id="steps",
                                     min_width=140)
        with gr.Row():
            add["cfg_pp"] = gr.Checkbox(label="CFG++", elem_id="cfg_pp", info="guidance by lambda", min_width=100)
            add["scale"] = gr.Slider(0, 20, first.scale, step=0.1, label="Scale", elem_id="scale", min_width=140)
            add["lam"] = gr.Slider(0, 2, first.lam, step=0.05, label="Lambda", elem_id="lam", visible=False,
                                   min_width=140)
            add["guidance"] = gr.Textbox(label="Rule, in place of the scale", placeholder="Rescale(CFG(7), 0.7)",
                                         elem_id="guidance", min_width=180)
        with gr.Row():
            add["width"] = gr.Number(0, label="Width (0: its own)", elem_id="width", **side)
            add["height"] = gr.Number(0, label="Height (0: its own)", elem_id="height", **side)
            add["count"] = gr.Slider(1, studio.limits.count, 1, step=1, label="Pictures", elem_id="count",
                                     min_width=140)
        with gr.Row(equal_height=True, elem_classes="ella-row"):
            add["seed"] = gr.Number(RANDOM, precision=0, label="Seed (-1: any)", elem_id="seed", min_width=140)
            buttons["dice"] = gr.Button("Dice", size="sm", elem_id="dice", min_width=80)
            buttons["reuse"] = gr.Button("Reuse the picture's", size="sm", elem_id="reuse", min_width=80)
        with gr.Accordion("Start picture and mask", open=False, elem_id="start-box"):
            add["start"] = gr.ImageEditor(
                type="pil", label="Paint over what is to be drawn anew; nothing painted: the whole", format="png",
                sources=("upload", "clipboard"), transforms=(), layers=False, elem_id="start", buttons=[],
                brush=gr.Brush(max(2, studio.pipeline.size // 16), colors=["#ffffff"], default_color="#ffffff",
                               color_mode="fixed"), height=360)  # by itself it paints half of a small picture
            add["strength"] = gr.Slider(0, 1, 0, step=0.01, label="Strength (0: 0.6, with a mask 1)",
                                        elem_id="strength")
        with gr.Accordion("Add-ons", open=False, elem_id="addons-box"):
            with gr.Row(equal_height=True, elem_classes="ella-row"):
                buttons["lora"] = gr.Dropdown(studio.names("lora"), label="LoRA", elem_id="lora-name", min_width=140)
                buttons["lora_strength"] = gr.Slider(-2, 2, 1, step=0.05, label="Strength", min_width=140)
                buttons["wear"] = gr.Button("Add", size="sm", elem_id="wear", min_width=80)
            add["lora"] = gr.Textbox(label="LoRAs, one NAME:STRENGTH a line", lines=1, max_lines=6, elem_id="lora")
            add["embedding"] = gr.Dropdown(studio.names("embedding"), multiselect=True, elem_id="embedding",
                                           label="Embeddings (words that CLIP reads)")
            with gr.Row():
                add["control"] = gr.Dropdown(["", *studio.names("control")], value="", label="Control",
                                             elem_id="control", min_width=140)
                add["control_weight"] = gr.Slider(0, 2, 1, step=0.05, label="Strength", min_width=140)
                add["control_edges"] = gr.Checkbox(label="Edges of the picture (canny)", min_width=140)
            add["control_picture"] = gr.Image(type="pil", label="The control's picture", format="png", height=200,
                                              sources=["upload", "clipboard"], elem_id="control_picture", buttons=[])
        with gr.Accordion("More", open=False, elem_id="more-box"):
            add["tags"] = gr.Textbox(label="Tags: a text for CLIP beside ELLA", elem_id="tags")
            add["more"] = gr.Textbox(label="Further options, one NAME: VALUE a line", lines=3, max_lines=12,
                                     elem_id="more", placeholder="hires: 2:0.5\nsyntax: on\neta: 0.5",
                                     info=", ".join(MORE))
        return buttons

    def _drawn(self) -> dict[str, Any]:
        right: dict[str, Any] = {}
        right["status"] = gr.HTML(view.said("Nothing drawn yet."), elem_id="status")
        right["gallery"] = gr.Gallery(show_label=False, format="png", columns=2, object_fit="contain", height="auto",
                                      elem_id="gallery", interactive=False, buttons=["download", "fullscreen"])
        right["text"] = gr.Textbox(label="Settings of the picture", lines=4, max_lines=10, interactive=False,
                                   elem_id="text", buttons=["copy"])
        right["send"] = gr.Button("Fill the form with these", size="sm", elem_id="send")
        right["saved"] = gr.State([])  # [(parameters, the request as JSON), ...] of what the gallery shows
        right["chosen"] = gr.State(0)
        return right

    def _settings(self, tabs: gr.Tabs) -> None:
        found = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                dropped = gr.Image(type="filepath", image_mode=None, label="Drop a picture of ours, or of the "
                                   "AUTOMATIC1111 web UI", sources=["upload", "clipboard"], elem_id="dropped",
                                   height=320, buttons=[])
                fill = gr.Button("Fill the form with these", variant="primary", elem_id="fill")
            with gr.Column(min_width=280):
                text = gr.Textbox(label="Settings", lines=8, max_lines=20, interactive=False, elem_id="found",
                                  buttons=["copy"])
                notes = gr.Textbox(label="Notes", lines=2, max_lines=10, interactive=False, elem_id="notes")
        dropped.change(self.read, dropped, [text, notes, found], **{**QUIET, "show_progress": "minimal"})
        fill.click(self.fill, found, [*self.inputs.values(), tabs], **QUIET)

    def _grid(self) -> gr.HTML:
        with gr.Row():
            with gr.Column(min_width=280):
                text = gr.Textbox(grids.EXAMPLE, label="What holds for all pictures, and axes: every combination is "
                                  "drawn", lines=14, max_lines=40, elem_id="grid-text")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="grid-run", min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="grid-stop", min_width=120)
            with gr.Column(min_width=280):
                status = gr.HTML(view.said("A grid that was stopped goes on where it was."), elem_id="grid-status")
                links = gr.HTML(elem_id="grids")
        ran = run.click(self.grid, text, [status, links], show_progress="minimal", show_progress_on=status,
                        api_name="grid", api_visibility="private", concurrency_id="grid", concurrency_limit=1)
        stop.click(lambda: view.said("Stopped; run it again to go on."), None, status, cancels=[ran], **QUIET)
        return links

    def _wire(self, blocks: gr.Blocks, buttons: dict[str, Any], right: dict[str, Any]) -> None:
        studio, add = self.studio, self.inputs
        shown = [right[name] for name in ("status", "gallery", "text", "saved", "chosen")]
        draw = buttons["draw"].click(self.draw, [*add.values()], shown, show_progress="minimal",
                                     show_progress_on=right["status"], api_name="page", api_visibility="private",
                                     **ONE)
        buttons["cancel"].click(lambda: view.said("Stopped; what was done is saved."), None, right["status"],
                                cancels=[draw], **QUIET)
        add["prompt"].change(studio.tokens, add["prompt"], buttons["tokens"], trigger_mode="always_last", **QUIET)
        buttons["longer"].click(self.longer, add["prompt"], add["prompt"], api_visibility="private",
                                concurrency_id="upsample", concurrency_limit=1)
        for each in (add["cfg_pp"], add["sampler"]):
            each.change(self.by_lambda, [add["cfg_pp"], add["sampler"]], [add["scale"], add["lam"]], **QUIET)
        buttons["dice"].click(lambda: RANDOM, None, add["seed"], **QUIET)
        buttons["reuse"].click(self.seed, [right["saved"], right["chosen"]], add["seed"], **QUIET)
        buttons["wear"].click(self.wear, [add["lora"], buttons["lora"], buttons["lora_strength"]], add["lora"], **QUIET)
        right["gallery"].select(self.choose, right["saved"], [right["text"], right["chosen"]], **QUIET)
        right["send"].click(self.send, [right["saved"], right["chosen"]], [*add.values()], **QUIET)
        blocks.load(self.look, None, [buttons["lora"], add["embedding"], add["control"]], **QUIET)

    # What the events call.

    def draw(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        began, saved = time.monotonic(), list[Saved]()
        keep = (gr.skip(),) * 4
        try:
            form = self.form(values)
            compared = form.mode == COMPARE
            yield view.said("Getting ready ..."), *keep
            with closing(self.studio.draw(form)) as drawing:
                for news in drawing:
                    if not isinstance(news, Saved):
                        yield view.going(news) if news else gr.skip(), *keep
                        continue
                    saved.append(news)
                    rows = sorted(saved, key=lambda each: each.request.seed) if compared else saved
                    texts = [(each.request.parameters(), each.request.json()) for each in rows]
                    pictures = [(str(each.path), view.caption(each, compared)) for each in rows]
                    columns = len({each.request.mode for each in saved}) if compared else min(3, len(saved))
                    yield (view.arrived(saved, news.total, str(news.path.parent), time.monotonic() - began),
                           gr.Gallery(pictures, columns=columns, selected_index=None), texts[0][0], texts, 0)
        except Exception as error:
            yield view.failed(message_of(error)), *keep

    def grid(self, text: str) -> Iterator[tuple[Any, Any]]:
        try:
            yield view.said("Checking ..."), gr.skip()
            with closing(grids.run(self.studio, text)) as drawing:
                for cells in drawing:
                    yield view.cells(cells) if cells else gr.skip(), gr.skip()
            yield gr.skip(), view.links(grids.known(self.studio))
        except Exception as error:
            yield view.failed(message_of(error)), gr.skip()

    def form(self, values: tuple[Any, ...]) -> Form:
        """The inputs' values, uploaded pictures kept in the output folder."""
        given = dict(zip(self.inputs, values, strict=True))
        start, mask, control = (None if picture is None else self.studio.keep(picture) for picture in (
            *start_and_mask(given.pop("start") or {}), given.pop("control_picture")))
        given["embedding"] = tuple(given["embedding"] or ())
        given = {name: "" if value is None and isinstance(getattr(Form, name), str) else value
                 for name, value in given.items()}
        return Form(**given, start=start, mask=mask, control_picture=control)

    def read(self, path: str | None) -> tuple[str, str, dict[str, Any] | None]:
        if path is None:
            return "", "", None
        try:
            form, text, told = self.studio.settings_of(path)
        except Exception as error:
            return "", message_of(error), None
        return text, "\n".join(told), asdict(form)

    def fill(self, found: dict[str, Any] | None) -> list[Any]:
        if found is None:
            return [gr.skip()] * (len(self.inputs) + 1)
        return [*self.filled(Form(**found)), gr.Tabs(selected="draw")]

    def send(self, saved: list[tuple[str, str]], chosen: int) -> list[Any]:
        if not saved:
            return [gr.skip()] * len(self.inputs)
        form, _ = filled(Request.from_json(saved[chosen][1]))
        return self.filled(form)

    def filled(self, form: Form) -> list[Any]:
        """A value for every input."""
        values = {name: getattr(form, name) for name in self.inputs}
        values |= {name: values[name] or 0 for name in ("width", "height", "strength")}  # how the page says None
        values["embedding"] = [*form.embedding]
        values["start"] = form.start and painted(form.start, form.mask)
        return [*values.values()]

    def choose(self, saved: list[tuple[str, str]], event: gr.SelectData) -> tuple[str, int]:
        index = int(event.index)
        return (saved[index][0], index) if index < len(saved) else ("", 0)

    def seed(self, saved: list[tuple[str, str]], chosen: int) -> Any:
        return Request.from_json(saved[chosen][1]).seed if saved else gr.skip()

    def wear(self, lines: str, name: str | None, strength: float) -> str:
        return "\n".join(filter(None, [lines.strip(), name and f"{name}:{strength:g}"]))

    def by_lambda(self, cfg_pp: bool, sampler: str) -> tuple[Any, Any]:
        by_lambda = cfg_pp or str(sampler).endswith(CFG_PP)
        return gr.update(visible=not by_lambda), gr.update(visible=by_lambda)

    def longer(self, prompt: str) -> str:
        try:
            return self.studio.longer(prompt)
        except Exception as error:
            raise gr.Error(view.escaped(message_of(error)), print_exception=False) from None

    def look(self) -> list[Any]:
        """What lies in the models' folder now."""
        names = self.studio.names
        return [gr.update(choices=names("lora")), gr.update(choices=names("embedding")),
                gr.update(choices=["", *names("control")])]

    def api_draw(self, prompt: str, negative: str = "", mode: str = Form.mode, sampler: str = Form.sampler,
                 schedule: str = Form.schedule, steps: int = Form.steps, scale: float = Form.scale, guidance: str = "",
                 width: int | None = None, height: int | None = None, seed: int = RANDOM, count: int = 1,
                 tags: str = "", lora: str = "", more: str = "") -> list[dict[str, Any]]:
        """Draw pictures, and wait for them: for each its file, which the client fetches, and its settings as text.

        scale: lambda for a sampler in _cfg_pp. seed: of the first picture, -1: any. lora, more: lines as on the page.
        """
        try:
            form = Form(prompt, negative, mode, sampler, False, schedule, steps, scale, scale, guidance, width, height,
                        seed, count, tags, lora, more=more)
            saved = [news for news in self.studio.draw(form) if isinstance(news, Saved)]
        except Exception as error:
            raise gr.Error(message_of(error), print_exception=False) from None
        return [{"picture": {"path": str(each.path.resolve()), "orig_name": each.path.name,
                             "meta": {"_type": "gradio.FileData"}},
                 "seed": each.request.seed, "parameters": each.request.parameters(), "told": [*each.told]}
                for each in saved]


def start_and_mask(value: dict[str, Any]) -> tuple[Image.Image | None, Image.Image | None]:
    """What an editor holds: the picture below, and white where somebody painted; None for none."""
    below, layers = value.get("background"), value.get("layers") or []
    if below is None or below.convert("RGBA").getextrema()[3][1] == 0:
        return None, None
    mask = Image.new("L", below.size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(below.size)
        mask.paste(255, mask=alpha)
    return below, mask if mask.getbbox() else None


def painted(start: str, mask: str | None) -> dict[str, Any]:
    """The same the other way."""
    with Image.open(start) as image:
        below = image.convert("RGBA")
    layers = []
    if mask is not None:
        with Image.open(mask) as image:
            layers = [Image.new("RGBA", below.size, "white")]
            layers[0].putalpha(image.convert("L").resize(below.size))
    return {"background": below, "layers": layers, "composite": Image.alpha_composite(below, layers[0]) if layers else
            below}
