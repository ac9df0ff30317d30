"""The page of `palimpsest ui`: two tabs around worker.py and explorer.py. Gradio is imported here and nowhere else.

What a model wrote goes into text boxes, never into HTML or Markdown: it stays text.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from palimpsest.files import UserError
from palimpsest.records import BASE
from palimpsest.report.heatmaps import short_name
from palimpsest.report.inputs import Inputs, method_name, read_inputs
from palimpsest.ui import asking, explorer
from palimpsest.ui.worker import Worker

Ask = Callable[..., Iterator[asking.State]]  # as Worker.ask
HOST = "127.0.0.1"  # and nothing else: the page runs models and shows files of this machine
# Gradio's blue for the chosen tab and its grey at the ends of the slider are too light to be read on white; its fields
# show the keyboard's focus by a shade alone.
STYLE = """
footer { display: none !important; }
.gradio-container { max-width: 76rem !important; width: 100% !important; margin: auto !important; }
.gradio-container { --ours: var(--primary-600); }
.dark .gradio-container { --ours: var(--primary-400); }
.gradio-container main { width: 100%; max-width: 100%; }
.gradio-container button[role=tab].selected { color: var(--ours); }
.gradio-container :is(.min_value, .max_value) { color: var(--body-text-color); }
.gradio-container :focus-visible { outline: 2px solid var(--ours) !important; outline-offset: 2px; }
"""


def serve(run: Path, port: int | None = None) -> Iterator[str]:
    """Show `run` until interrupted, after a line that says where; raises as `served`."""
    with served(run, port) as page:
        yield f"{run} is at {page.local_url} until you press Ctrl+C."
        page.block_thread()


@contextmanager
def served(run: Path, port: int | None = None, ask: Ask | None = None) -> Iterator[Any]:
    """The running page at http://127.0.0.1:PORT (`.local_url`), closed at the end.

    ask: what answers; default: the models, in a process of their own.

    Raises:
        UserError: no Gradio, no study in `run`, or the port is taken.
    """
    panel, inputs = asking.open_panel(run), read_inputs(run)
    gradio = _gradio()
    with closing(Worker(panel)) as worker, _place_for_recordings():
        page = build(gradio, panel, inputs, ask or worker.ask)
        # Fonts of the system: the themes' own are loaded from a font service.
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gradio.themes.Base(**fonts, primary_hue="blue").set(
            button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700"
        )  # one shade darker than Gradio's, which is too light for the white on it
        try:
            page.launch(
                **{"server_name": HOST, "server_port": port, "share": False, "inbrowser": False, "quiet": True},
                **{"prevent_thread_lock": True, "show_error": True, "ssr_mode": False, "max_file_size": "50mb"},
                **{"theme": theme, "css": STYLE, "footer_links": [], "enable_monitoring": False},
                app_kwargs={"middleware": [_this_machine_only()]},
            )
        except OSError as error:
            where = "No port" if port is None else f"Port {port}"
            raise UserError(f"{where} is free for the page ({error}); give another with --port.") from error
        try:
            yield page
        finally:
            page.close(verbose=False)


@contextmanager
def _place_for_recordings() -> Iterator[None]:
    """A folder for what is recorded and uploaded, gone with the page; an earlier page gets its own back."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="palimpsest-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _this_machine_only() -> Any:
    """Requests for another host are refused: a page on the web could have its own name point to this address."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which looks for a new version
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "The page needs Gradio, which is not installed; install it with pip install 'palimpsest-llm[ui]'."
        ) from error
    return gradio


def build(gradio: Any, panel: asking.Panel, inputs: Inputs, ask: Ask) -> Any:
    """The page, not yet served."""
    name = panel.run.resolve().name
    with gradio.Blocks(title=f"{name} · palimpsest", analytics_enabled=False) as page:
        gradio.Markdown("# palimpsest", elem_id="title")
        gradio.Textbox(value=f"{panel.config.name} in {panel.run}", label="Run", interactive=False, lines=1)
        with gradio.Tab("Ask"):
            _ask_tab(gradio, panel, ask)
        with gradio.Tab("Importance"):
            _importance_tab(gradio, inputs)
    page.queue(default_concurrency_limit=1)  # two models loading at once may not fit
    return page


# ----------------------------------------------------------------------------------------------------------
# Ask
# ----------------------------------------------------------------------------------------------------------
def _ask_tab(gradio: Any, panel: asking.Panel, answer: Ask) -> None:
    chosen, most = panel.first_choice, panel.config.evaluation.max_new_tokens
    with gradio.Row(equal_height=True):
        text = gradio.Textbox(label="Question as text", lines=3, max_lines=6, scale=1)
        # Files go on as they are: to convert them Gradio needs ffmpeg, and libsndfile reads them all.
        audio = gradio.Audio(label="Question as speech", sources=["microphone", "upload"], type="filepath", scale=1)
    asked = gradio.CheckboxGroup(
        [(method_name(model), model) for model in panel.models], value=list(chosen), label="Models", elem_id="models"
    )
    with gradio.Row():
        limit = gradio.Slider(1, max(256, most), value=most, step=1, label="Most tokens of an answer", scale=3)
        button = gradio.Button("Ask", variant="primary", scale=1)
    status = gradio.Textbox(
        label="Status",
        value="A model is loaded when you ask; the one before goes first.",
        interactive=False,
        elem_id="status",
    )
    boxes: dict[asking.Key, Any] = {}
    for heading, how in (("From text", "text"), ("From speech", "speech")):
        gradio.Markdown(f"## {heading}")
        inputs: tuple[asking.Input, ...] = ("text",) if how == "text" else ("speech", "cascade")
        with gradio.Row():
            for key in panel.keys(inputs):
                boxes[key] = gradio.Textbox(
                    label="Cascade" if key[1] == "cascade" else method_name(key[0]),
                    value=panel.refusals.get(key, ""),
                    interactive=False,
                    lines=4,
                    max_lines=12,
                    min_width=180,
                    elem_id=f"{key[1]}-{key[0]}",
                    visible=key[0] in chosen,
                )

    def ask(question: str, recording: str | None, models: list[str], most: float) -> Iterator[dict[Any, str]]:
        spoken = Path(recording) if recording else None
        before: Any = None
        try:
            for state in answer(text=question, audio=spoken, models=models, max_new_tokens=int(most)):
                answers = {box: shown(panel, state, key) for key, box in boxes.items()}
                yield {status: state.status, **(answers if answers != before else {})}
                before = answers
        except UserError as error:
            yield {status: str(error), **{box: panel.refusals.get(key, "") for key, box in boxes.items()}}

    arguments = {
        **{"fn": ask, "inputs": [text, audio, asked, limit], "outputs": [status, *boxes.values()]},
        **{"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "models"},
    }
    asked.change(
        lambda models: [gradio.update(visible=model in models) for model, _ in boxes],
        inputs=asked,
        outputs=[*boxes.values()],
        show_progress="hidden",
    )
    button.click(**arguments)
    text.submit(**arguments)


def shown(panel: asking.Panel, state: asking.State, key: asking.Key) -> str:
    """What stands in a box: the answer, or why there is none, or nothing yet."""
    return state.answers.get(key) or state.refusals.get(key) or panel.refusals.get(key, "")


# ----------------------------------------------------------------------------------------------------------
# Importance
# ----------------------------------------------------------------------------------------------------------
def _importance_tab(gradio: Any, inputs: Inputs) -> None:
    models, reductions = explorer.models_of(inputs), explorer.reductions_of(inputs)
    names = explorer.matrices_of(inputs)
    tuned = [name for name in models if name != BASE]
    missing = explorer.missing_from(inputs)
    if missing or not models:
        gradio.Textbox(
            label="Missing from this run", interactive=False, elem_id="missing",
            value="\n".join([*missing, *([] if models else ["There are no importance scores."])]),
        )  # fmt: skip
    if not models:
        return
    with gradio.Row():
        model = gradio.Dropdown(
            [(method_name(name), name) for name in tuned or models], value=(tuned or models)[0], label="Base against",
            elem_id="model",
        )  # fmt: skip
        reduction = gradio.Dropdown(reductions or [""], value=(reductions or [""])[0], label="Reduction")
        measure = gradio.Dropdown(
            [(words, key) for key, words in explorer.MEASURES.items()], value="mean", label="Importance by"
        )
    grids = gradio.Plot(label="Layers × kinds", show_label=False, elem_id="grids")
    chosen = gradio.Dropdown(
        [(short_name(name), name) for name in names], value=names[len(names) // 2] if names else None,
        label="One matrix", elem_id="matrix",
    )  # fmt: skip
    matrices = gradio.Plot(label="Rows and columns", show_label=False, elem_id="matrices")
    notes = gradio.Textbox(label="About these figures", interactive=False, lines=2, elem_id="notes")

    def draw_grids(name: str, by: str, what: str) -> Any:
        found, why = _each(lambda one: explorer.grid(inputs, one, by, what), (BASE, name))
        base = next((g for g in found if g.model == BASE), None)
        other = next((g for g in found if g.model != BASE), None)
        return explorer.draw_grids(base, other, what) if found else None, "\n".join(why)

    def draw_matrices(name: str, by: str, matrix: str | None) -> Any:
        if matrix is None:
            return None, "There is no matrix to show."
        found, why = _each(lambda one: explorer.matrix(inputs, one, matrix, by), (BASE, name))
        said = "\n".join([explorer.about(found), *why]).strip()
        return explorer.draw_matrices(found) if found else None, said

    def draw_both(name: str, by: str, what: str, matrix: str | None) -> Any:
        (first, why), (second, said) = draw_grids(name, by, what), draw_matrices(name, by, matrix)
        return first, second, "\n".join(filter(None, (why, said)))

    everything = {
        **{"fn": draw_both, "inputs": [model, reduction, measure, chosen], "outputs": [grids, matrices, notes]},
        **{"concurrency_limit": 1, "concurrency_id": "figures"},
    }
    for choice in (model, reduction, measure):
        choice.input(**everything)
    chosen.input(draw_matrices, [model, reduction, chosen], [matrices, notes], concurrency_id="figures")
    gradio.context.Context.root_block.load(**everything)


def _each(read: Callable[[str], Any], models: tuple[str, ...]) -> tuple[list[Any], list[str]]:
    """What could be read of the models, and a sentence for each that could not."""
    found, why = [], []
    for name in dict.fromkeys(models):
        try:
            found.append(read(name))
        except UserError as error:
            why.append(str(error))
    return found, why
