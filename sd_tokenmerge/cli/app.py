"""`sd-tokenmerge app`: explore merging in a browser."""

from __future__ import annotations

import os
from importlib.util import find_spec
from socket import create_server
from threading import Event
from typing import Annotated, Any

import typer

from sd_tokenmerge.cli.errors import UserError, user_errors
from sd_tokenmerge.cli.field_options import given_values, with_options
from sd_tokenmerge.sampling.options import GenerateOptions

_OPTIONS = (
    *("negative_prompt", "guidance_scale", "noise_device"),
    *("model", "model_config", "revision", "variant", "dtype", "device", "scheduler", "vae"),
    *("lora", "attention_backend", "offload", "local_files_only"),
)


@with_options(GenerateOptions, only=_OPTIONS)
def app_command(
    *,
    host: Annotated[
        str, typer.Option(help="Address to serve the page at; 0.0.0.0 for the whole network.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of the page. Default: the first free one from 7860 on.", min=1, max=65_535
        ),
    ] = None,
    **values: Any,
) -> None:
    """Serve a page with unmerged and merged pictures of any prompt.

    Shows the pictures beside each other with their difference, PSNR, time and attention products,
    draws the clusters by step and block, and compares methods. Needs the extra "app".
    """
    if find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install gradio")
    with user_errors(OSError):
        create_server((host, port or 0)).close()  # gradio would try a hundred ports
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from sd_tokenmerge.app.page import AppPage
    from sd_tokenmerge.app.studio import Studio

    with user_errors(TypeError, ValueError, OSError):
        studio = Studio(GenerateOptions(out="-", **given_values(GenerateOptions, values)))
    page = AppPage(studio)
    with user_errors(OSError):
        url = page.launch(host=host, port=port)
    print(f"sd-tokenmerge app: {url} (Ctrl-C ends it)", flush=True)
    try:
        Event().wait()
    finally:
        page.close()
