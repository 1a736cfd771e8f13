"""The page in gradio: inputs, buttons, and which function of the studio each calls."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import gradio as gr

from ella_kd.app.web import grids, inputs, view
from ella_kd.app.web.form import CFG_PP, COMPARE, RANDOM, Form, filled
from ella_kd.app.web.session import Saved, Studio, message_of
from ella_kd.app.web.uploads import opened, painted, start_and_mask
from ella_kd.request import Request

ONE = {"concurrency_id": "model", "concurrency_limit": 1}  # of everything that draws
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


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
                        buttons = inputs.prompt(self.studio, self.inputs)
                    with gr.Column(min_width=280, elem_id="drawn"):
                        right = self._drawn()
                    with gr.Column(min_width=280, elem_id="options"):
                        buttons |= inputs.options(self.studio, self.inputs)
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
        stop.click(None, cancels=[ran], **QUIET).then(
            lambda: view.said("Stopped; run it again to go on."), None, status, **QUIET)
        return links

    def _wire(self, blocks: gr.Blocks, buttons: dict[str, Any], right: dict[str, Any]) -> None:
        studio, add = self.studio, self.inputs
        shown = [right[name] for name in ("status", "gallery", "text", "saved", "chosen")]
        draw = buttons["draw"].click(self.draw, [*add.values()], shown, show_progress="minimal",
                                     show_progress_on=right["status"], api_name="page", api_visibility="private",
                                     **ONE)
        buttons["cancel"].click(None, cancels=[draw], **QUIET).then(  # then: the last step's news may come behind it
            lambda: view.said("Stopped; what was done is saved."), None, right["status"], **QUIET)
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
        """The inputs' values, uploaded pictures kept in the output folder if they can be drawn from."""
        given = dict(zip(self.inputs, values, strict=True))
        side = self.studio.limits.side
        pictures = start_and_mask(given.pop("start") or {}, side)
        control = given.pop("control_picture")
        if control is not None and given["control"]:
            pictures["control_picture"] = opened(control, side).convert("RGB")
        given["embedding"] = tuple(given["embedding"] or ())
        given = {name: "" if value is None and isinstance(getattr(Form, name), str) else value
                 for name, value in given.items()}
        return self.studio.with_pictures(Form(**given), pictures)

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
                 schedule: str = Form.schedule, steps: int = Form.steps, scale: float | None = None, guidance: str = "",
                 width: int | None = None, height: int | None = None, seed: int = RANDOM, count: int = 1,
                 tags: str = "", lora: str = "", more: str = "") -> Iterator[list[dict[str, Any]]]:
        """Draw pictures, and wait for them: for each its file, which the client fetches, and its settings as text.

        scale: lambda for a sampler in _cfg_pp; None: 7, and 0.6 for lambda. seed: of the first picture, -1: any. lora,
        more: lines as on the page. Until all are drawn the answer is an empty list.
        """
        try:
            form = Form(prompt, negative, mode, sampler, False, schedule, steps, Form.scale if scale is None else scale,
                        Form.lam if scale is None else scale, guidance, width, height, seed, count, tags, lora,
                        more=more)
            saved = list[Saved]()
            yield []  # what is cancelled before its first yield is never closed; a plain function draws to its end
            with closing(self.studio.draw(form)) as drawing:
                for news in drawing:
                    saved += [news] if isinstance(news, Saved) else []
                    yield []
        except Exception as error:
            raise gr.Error(message_of(error), print_exception=False) from None
        yield [{"picture": {"path": str(each.path.resolve()), "orig_name": each.path.name,
                            "meta": {"_type": "gradio.FileData"}},
                "seed": each.request.seed, "parameters": each.request.parameters(), "told": [*each.told]}
               for each in saved]
