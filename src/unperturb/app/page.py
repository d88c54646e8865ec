"""The page: its widgets, and which of them calls which handler."""

# Annotations are left as they are: Gradio reads those of functions that stand inside another one.
from functools import partial
from typing import Any

from unperturb.app import choices, handlers, says
from unperturb.app.images import from_set
from unperturb.data.sets import DataError

TOP = 3  # classes with a bar
CSS = """
.pixels img { image-rendering: pixelated }
#pictures .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)); grid-auto-rows: auto }
#pictures .thumbnail-item { aspect-ratio: 1; height: auto }
#pictures .caption-label { display: none }
#ladder { overflow-x: auto }
#ladder :is(td, th) { white-space: nowrap; padding: 4px 10px }
"""
INTRO = """# unperturb
Pick an image, a classifier and the purifier before it; then attack them. An *oblivious* attacker knows the classifier
alone. The others know the purifier too."""


def build(device: str = "cpu") -> Any:
    """The page as `gradio.Blocks`, its models on `device`. Raises `ImportError` without the extra `app`, and what
    `choices.offered` does."""
    import gradio as gr

    offered = choices.offered()
    dataset0 = first_here(list(offered))
    data0, nets0 = choices.test_images(dataset0), offered[dataset0]

    with gr.Blocks(title="unperturb", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        chosen, turn = gr.State(from_set(data0, handlers.page_of(dataset0, 0)[0])), gr.State(0)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                dataset = gr.Dropdown(list(offered), value=dataset0, label="Images")
                with gr.Tabs():
                    with gr.Tab("Pick"):
                        pictures = gr.Gallery(
                            handlers.gallery(dataset0, 0),
                            height=270,
                            allow_preview=False,
                            format="png",
                            show_label=False,
                            interactive=False,
                            buttons=[],
                            elem_id="pictures",
                            elem_classes="pixels",
                        )
                        more = gr.Button("Others", size="sm")
                    with gr.Tab("Draw"):
                        no_drawing = gr.Markdown(
                            "A drawing is grey, and these images have colors. Choose mnist or digits.",
                            visible=data0.shape[0] != 1,
                        )
                        drawing = gr.Column(visible=data0.shape[0] == 1)
                        with drawing:
                            canvas = gr.Sketchpad(
                                canvas_size=(280, 280),
                                height=340,
                                fixed_canvas=True,
                                image_mode="L",
                                brush=gr.Brush(default_size=22, colors=["#000000"], color_mode="fixed"),
                                layers=False,
                                transforms=(),
                                buttons=[],
                                show_label=False,
                                placeholder="Take the brush and draw a digit.",
                                elem_id="canvas",
                            )
                            use = gr.Button("Use the drawing", size="sm")
                    with gr.Tab("Upload"):
                        upload = gr.UploadButton("A PNG or JPEG", file_types=[".png", ".jpg", ".jpeg"], size="sm")
                        gr.Markdown("It is resized and cropped to the size that the classifier takes.")
                given = gr.Dropdown(
                    [handlers.UNKNOWN, *data0.class_names],
                    value=handlers.UNKNOWN,
                    label="Its class",
                    info="An attack makes the model leave it.",
                    visible=False,
                )
                classifier = gr.Dropdown(list(nets0.classifiers), value=nets0.classifiers[0], label="Classifier")
                purifier = gr.Dropdown(list(nets0.purifiers), value=nets0.purifiers[0], label="Purifier")
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    attack = gr.Dropdown(choices.attack_names(), value="pgd", label="Attack", min_width=130)
                    effort = gr.Number(**handlers.effort("pgd"), precision=0, minimum=1, maximum=100_000, min_width=130)
                    norm = gr.Radio(**handlers.norms("pgd"), label="Norm", min_width=130)
                    eps = gr.Textbox(choices.budget_for(dataset0, "linf"), label="Budget", min_width=130)
                with gr.Row(equal_height=True):
                    knows = gr.Radio(**handlers.knowledge("pgd"), label="The attacker is", scale=3, elem_id="knows")
                    with gr.Column(min_width=200):
                        go = gr.Button("Attack", variant="primary", size="md")
                        up = gr.Button("Climb the ladder", size="md")
                title = gr.Markdown(elem_id="title")
                with gr.Row():
                    tiles = [
                        *_tile("Clean", "Classifier alone"),
                        *_tile("Adversarial", "Classifier alone"),
                        *_tile("Restored", "Behind the purifier"),
                    ]
                    with gr.Column(min_width=150):
                        tiles += [_picture("Difference"), gr.Markdown(elem_id="amplified")]
                said = gr.Markdown(handlers.ATTACK_IT, elem_id="verdict")
                steps = gr.Markdown(elem_id="ladder")
                stop = gr.Button("Stop", size="sm", visible=False)

        image = [dataset, classifier, purifier, chosen, given]
        show = {"fn": partial(handlers.look_at, device), "inputs": image, "outputs": [title, *tiles, said, steps]}
        # Who attacks a model holds it still: one at a time.
        show |= (busy := {"concurrency_id": "models", "concurrency_limit": 1})

        def picked(dataset: str, turn: int, event: gr.SelectData) -> Any:
            return handlers.pick(dataset, turn, event.index)

        own = [turn, pictures, drawing, no_drawing, given, classifier, purifier, eps, chosen]
        dataset.input(handlers.other_set, [dataset, norm], own).success(**show)
        more.click(handlers.others, [dataset, turn], [turn, pictures])
        pictures.select(picked, [dataset, turn], [chosen, given]).success(**show)
        use.click(handlers.draw, [dataset, canvas], [chosen, given]).success(**show)
        upload.upload(handlers.take, [dataset, upload], [chosen, given]).success(**show)
        for widget in (given, classifier, purifier):
            widget.input(**show)
        page.load(**show)
        attack.input(handlers.other_attack, [dataset, attack], [effort, norm, eps, knows])
        norm.input(choices.budget_for, [dataset, norm], eps)
        knows.input(lambda name: gr.update(info=handlers.meaning(name)), knows, knows)
        asked = [*image, attack, norm, eps, effort, knows]
        go.click(partial(handlers.strike, device), asked, [*tiles, said], **busy)
        climbing = up.click(partial(handlers.up_the_ladder, device), [*image, norm, eps], [steps, stop], **busy)
        stop.click(lambda text: (says.stopped(text), gr.update(visible=False)), steps, [steps, stop], cancels=climbing)
    return page


def first_here(names: list[str]) -> str:
    """The first of these data sets that is on this machine. Raises `DataError` where none is."""
    for name in names:
        try:
            choices.test_images(name)
            return name
        except DataError:
            continue
    raise DataError(f"none of {', '.join(names)} is here; with a network run: unperturb prepare {names[0]}")


def _picture(name: str) -> Any:
    import gradio as gr

    gr.Markdown(f"**{name}**")
    return gr.Image(
        label=name,
        show_label=False,
        format="png",
        height=190,
        interactive=False,
        buttons=["download"],
        elem_classes="pixels",
    )


def _tile(name: str, label: str) -> tuple[Any, Any]:
    """A picture, and what is said of it with its probabilities."""
    import gradio as gr

    with gr.Column(min_width=150):
        return _picture(name), gr.Label(num_top_classes=TOP, label=label, elem_id=name.lower())
