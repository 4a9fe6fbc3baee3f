"""The page of the app, made with gradio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from threading import Event
from typing import Any, get_args
from weakref import WeakValueDictionary

import gradio as gr

from sd_tokenmerge.app.comparison import MEASUREMENTS, Comparison, measurements
from sd_tokenmerge.app.components import FieldComponent
from sd_tokenmerge.app.studio import (
    DIFFERENCE_GAIN,
    MergedPicture,
    OnStep,
    Studio,
    difference,
)
from sd_tokenmerge.config import PRESETS, Merge, MergeConfig
from sd_tokenmerge.devices import is_out_of_memory
from sd_tokenmerge.files import describe_error
from sd_tokenmerge.methods import METHODS
from sd_tokenmerge.report.captions import short_name
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.run import NotANumberError

Values = Mapping[Any, Any]
"""What the page's components hold, by component."""

_PICTURE_OPTIONS = ("seed", "height", "width", "steps")
_MAIN_OPTIONS = ("method", "keep_rate", "merge", "refresh_every")
"""Merging options that are always visible."""
_EXAMPLES = 12
"""Prompts to choose from."""
_METHODS, _FORMS = ["atc", "tome-sd", "random"], ["qkv", "two-sided"]
"""What is compared at first."""
_KEEP_RATES = ["0.25", "0.5", "0.1"]
"""Keep rates to choose from; the first is compared at first."""
_STYLE = """
.picture img { max-height: 70vh; object-fit: contain; }
.picture .image-container { padding-top: 2rem; }
.clusters img { height: min(60vh, 75vw); image-rendering: pixelated; }
.clusters code { overflow-wrap: anywhere; white-space: normal; }
.numbers { overflow-x: auto; }
.numbers :is(td, th) { overflow-wrap: normal; word-break: normal; }
.progress { min-height: 5rem; }
.progress:has([data-testid="status-tracker"].hide) { display: none; }
.progress .progress-text { position: static !important; transform: none !important; }
"""
"""Pictures fit on the screen, below their labels; tables can be scrolled, their words stay whole;
progress takes space only while something runs."""
_NOTHING_YET = "Generate a picture first."


class _CancelledError(Exception):
    """The user cancelled a generation."""


class AppPage:
    """The page, and the handlers of its events.

    Attributes:
        blocks: the gradio page.
    """

    def __init__(self, studio: Studio) -> None:
        """Build the page for a pipeline."""
        self._studio = studio
        self._running: WeakValueDictionary[str | None, Event] = WeakValueDictionary()
        self.blocks = gr.Blocks(
            title="sd-tokenmerge",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(600, 3600),
        )
        with self.blocks:
            gr.Markdown(f"# sd-tokenmerge\nModel: {short_name(studio.defaults.model)}")
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self._build_settings()
                with gr.Column(scale=3, min_width=320):
                    with gr.Tab("Side by side"):
                        self._build_pictures()
                    with gr.Tab("Clusters"):
                        self._build_clusters()
                    with gr.Tab("Compare methods"):
                        self._build_comparison()
            self._connect()

    def launch(self, *, host: str, port: int | None) -> str:
        """Serve the page in the background, and return its address.

        Args:
            host: name or address of the network interface.
            port: None: the first free one from 7860 on.

        Raises:
            OSError: the port is in use.
        """
        self.blocks.queue(default_concurrency_limit=1)
        _, url, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=["settings"],
            theme=gr.themes.Default(font=("sans-serif",), font_mono=("monospace",)),
            css=_STYLE,
        )
        return str(url)

    def close(self) -> None:
        """Stop serving; generations end after their current step."""
        for run in list(self._running.values()):
            run.set()
        self.blocks.close(verbose=False)

    def _build_settings(self) -> None:
        prompts, defaults = self._studio.prompts(), self._studio.defaults
        self._prompt = gr.Textbox(prompts[0], label="prompt", lines=2)
        with gr.Accordion("Prompts", open=False):
            gr.Examples(prompts[:_EXAMPLES], self._prompt, label="", examples_per_page=_EXAMPLES)
        with gr.Row():
            self._picture_options = [
                FieldComponent(GenerateOptions, name, getattr(defaults, name), explain=False)
                for name in _PICTURE_OPTIONS
            ]
        self._generate_button, self._cancel_button, self._progress = _buttons("Generate")
        names = [entry.name for entry in fields(MergeConfig)]
        self._preset = gr.Dropdown(
            list(PRESETS), label="preset", info="Fills in all merging options."
        )
        self._merging_options = _merging_components(_MAIN_OPTIONS)
        with gr.Accordion("More merging options", open=False):
            self._merging_options += _merging_components(
                [name for name in names if name not in _MAIN_OPTIONS]
            )

    def _build_pictures(self) -> None:
        with gr.Row():
            self._unmerged = _image("Unmerged")
            self._merged = _image("Merged")
            self._difference = _image(f"Difference, times {DIFFERENCE_GAIN}")
        self._numbers = gr.Markdown(elem_classes="numbers")

    def _build_clusters(self) -> None:
        self._made = gr.State()
        with gr.Row():
            self._step = gr.Slider(1, 2, 1, step=1, label="step", interactive=False)
            self._block = gr.Slider(1, 2, 1, step=1, label="block", interactive=False)
        self._drawing_title = gr.Markdown(_NOTHING_YET, elem_classes="clusters")
        self._drawing = _image("Clusters", "clusters")

    def _build_comparison(self) -> None:
        gr.Markdown("Every method with every form and keep rate; other options as on the left.")
        many = {"multiselect": True, "allow_custom_value": True}
        with gr.Row():
            self._compared = [
                gr.Dropdown(list(METHODS), value=_METHODS, label="method", **many),
                gr.Dropdown(list(get_args(Merge)), value=_FORMS, label="merge", multiselect=True),
                gr.Dropdown(_KEEP_RATES, value=_KEEP_RATES[:1], label="keep rate", **many),
            ]
        self._compare_button, self._cancel_comparison, self._comparing = _buttons("Compare")
        self._sheet = _image("Comparison")
        self._table = gr.Markdown(elem_classes="numbers")

    def _connect(self) -> None:
        merging = [option.component for option in self._merging_options]
        picture = [option.component for option in self._picture_options]
        inputs = {self._prompt, *picture, *merging}
        clusters = [self._made, self._step, self._block]
        drawing = [self._drawing, self._drawing_title]
        made = gr.on(
            [self._generate_button.click, self._prompt.submit],
            self._generate,
            inputs=inputs | {self._step, self._block},
            outputs=[self._unmerged, self._merged, self._difference, self._numbers, *clusters],
            show_progress_on=self._progress,
            concurrency_id="pipeline",
        )
        made.success(_draw_clusters, clusters, drawing)
        gr.on(
            [self._step.input, self._block.input],
            _draw_clusters,
            clusters,
            drawing,
            trigger_mode="always_last",
            show_progress="hidden",
        )
        compared = self._compare_button.click(
            self._compare,
            inputs=inputs | set(self._compared),
            outputs=[self._sheet, self._table],
            show_progress_on=self._comparing,
            concurrency_id="pipeline",
        )
        gr.on(
            [self._cancel_button.click, self._cancel_comparison.click],
            self._stop,
            cancels=[made, compared],
            queue=False,
        )
        self.blocks.unload(self._stop)
        self._preset.input(self._fill_in, self._preset, merging, queue=False)

    def _fill_in(self, preset: str) -> list[Any]:
        config = PRESETS[preset]
        return [option.shown(getattr(config, option.name)) for option in self._merging_options]

    def _stop(self, request: gr.Request) -> None:
        """End the session's generation after its current step."""
        run = self._running.get(request.session_hash)
        if run is not None:
            run.set()

    def _generate(
        self,
        values: Values,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Iterator[dict[Any, Any]]:
        run = self._running[request.session_hash] = Event()
        prompt, studio = values[self._prompt], self._studio
        with _input_errors(), _generation_errors():
            merging = MergeConfig(**_read(self._merging_options, values))
            settings = studio.settings(merging, **_read(self._picture_options, values))
            follow = _follow(run, progress, "Unmerged picture")
            unmerged = studio.unmerged(prompt, settings, follow)
            yield {
                self._unmerged: unmerged.image,
                self._merged: None,
                self._difference: None,
                self._numbers: "",
            }
            follow = _follow(run, progress, "Merged picture")
            merged = studio.merged(prompt, settings, follow)
            table = [
                ["", *MEASUREMENTS],
                ["unmerged", *measurements(unmerged, unmerged)],
                ["merged", *measurements(merged, unmerged)],
            ]
            yield {
                self._merged: merged.image,
                self._difference: difference(merged.image, unmerged.image),
                self._numbers: _markdown(table),
                self._made: merged,
                self._step: _slider(values[self._step], len(merged.recording.steps)),
                self._block: _slider(values[self._block], len(merged.recording.blocks)),
            }

    def _compare(
        self,
        values: Values,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Iterator[dict[Any, Any]]:
        run = self._running[request.session_hash] = Event()
        with _input_errors(), _generation_errors():
            comparison = Comparison(*(values[component] for component in self._compared))
            for _ in comparison.run(
                self._studio,
                values[self._prompt],
                picture=_read(self._picture_options, values),
                merging=_read(self._merging_options, values),
                follow=lambda title: _follow(run, progress, title),
            ):
                yield self._show(comparison)
            yield self._show(comparison)

    def _show(self, comparison: Comparison) -> dict[Any, Any]:
        refused = [
            f"- {', '.join(setting)}: {reason}" for setting, reason in comparison.refused.items()
        ]
        return {
            self._sheet: comparison.sheet(),
            self._table: "\n".join([_markdown(comparison.table()), "", *refused]),
        }


def _merging_components(names: Iterable[str]) -> list[FieldComponent]:
    initial = PRESETS["paper"]
    return [FieldComponent(MergeConfig, name, getattr(initial, name)) for name in names]


def _buttons(start: str) -> tuple[Any, Any, Any]:
    """A button that starts a generation, one that cancels it, and below them its progress."""
    with gr.Row():
        buttons = (
            gr.Button(start, variant="primary", min_width=120),
            gr.Button("Cancel", min_width=120),
        )
    return *buttons, gr.HTML(elem_classes="progress", padding=False)


def _image(label: str, *classes: str) -> Any:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["picture", *classes],
    )


def _read(options: Iterable[FieldComponent], values: Values) -> dict[str, Any]:
    """The fields that the page's components hold."""
    return {option.name: option.read(values) for option in options}


def _slider(value: int, count: int) -> Any:
    """A slider from 1 to `count`; gradio has none with a single value."""
    return gr.Slider(value=min(value, count), maximum=max(count, 2), interactive=count > 1)


def _draw_clusters(made: MergedPicture | None, step: int, block: int) -> tuple[Any, str]:
    return (None, _NOTHING_YET) if made is None else made.draw_clusters(step, block)


def _markdown(table: list[list[str]]) -> str:
    header, *body = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([header, "|---" * len(table[0]) + "|", *body])


def _follow(run: Event, progress: Any, title: str) -> OnStep:
    """Show the steps of a generation on the page, and stop it when `run` is set."""

    def on_step(done: int, total: int) -> None:
        if run.is_set():
            raise _CancelledError
        progress((done, total), desc=title, unit="steps")

    return on_step


@contextmanager
def _input_errors() -> Iterator[None]:
    """Show the library's messages about bad settings on the page."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise gr.Error(describe_error(error), print_exception=False) from error


@contextmanager
def _generation_errors() -> Iterator[None]:
    """Show on the page what can go wrong during a generation, and end it when it is cancelled."""
    try:
        yield
    except _CancelledError:
        pass
    except NotANumberError as error:
        message = (
            "The picture has NaN pixels. Half precision is a common cause: start the app with "
            "--dtype bfloat16 or float32."
        )
        raise gr.Error(message, print_exception=False) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (
            "The device has too little memory: generate a smaller picture, or start the app with "
            "--offload model."
        )
        raise gr.Error(message, print_exception=False) from error
