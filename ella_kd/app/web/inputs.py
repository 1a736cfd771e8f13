"""The inputs of a form in gradio, and the buttons beside them."""

from typing import Any

import gradio as gr

from ella_kd.app.web.form import CFG_PP, COMPARE, MORE, RANDOM, Form
from ella_kd.app.web.session import Studio
from ella_kd.samplers import SAMPLERS, SCHEDULES
from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES, RANGE_SAMPLERS

MODES = {"ELLA flexible": "flexible", "ELLA fixed": "fixed", "plain SD": "clip"}
EXAMPLE = "The scene is set in a deep forest. A striped red heart sits in the top left corner."  # the miniature's world


def first_form(studio: Studio) -> Form:
    """What the inputs hold before anybody says anything."""
    if studio.pipeline.name == "miniature":
        return Form(prompt=EXAMPLE, scale=3.0)  # the scale of its published numbers
    return Form()


def prompt(studio: Studio, add: dict[str, Any]) -> dict[str, Any]:
    """The prompt, its inputs put into add by the names of `Form`; the buttons around it."""
    first = first_form(studio)
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


def options(studio: Studio, add: dict[str, Any]) -> dict[str, Any]:
    """All else that a form holds, put into add; the buttons that change it."""
    first = first_form(studio)
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
        add["start"].convert_and_format_image = undecoded
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
        add["control_picture"] = gr.Image(type="filepath", image_mode=None, format="png", height=200, buttons=[],
                                          label="The control's picture", sources=["upload", "clipboard"],
                                          elem_id="control_picture")
    with gr.Accordion("More", open=False, elem_id="more-box"):
        add["tags"] = gr.Textbox(label="Tags: a text for CLIP beside ELLA", elem_id="tags")
        add["more"] = gr.Textbox(label="Further options, one NAME: VALUE a line", lines=3, max_lines=12,
                                 elem_id="more", placeholder="hires: 2:0.5\nsyntax: on\neta: 0.5",
                                 info=", ".join(MORE))
    return buttons


def undecoded(file: Any, **_: Any) -> str | bytes | None:
    """What an editor gives for each of its pictures, a file or bytes: gradio decodes them whatever their size."""
    return file if file is None else bytes(file) if isinstance(file, (bytes, bytearray, memoryview)) else file.path
