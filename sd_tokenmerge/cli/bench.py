"""`sd-tokenmerge bench`: whether merging pays on this machine, for one model and size."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import UserError, generation_errors, interruption, user_errors
from sd_tokenmerge.cli.field_options import given_values, with_options
from sd_tokenmerge.cli.generate import AsJson, Size, read_size
from sd_tokenmerge.sampling.options import GenerateOptions

_OPTIONS = (
    *("out", "classes", "prompts", "steps", "guidance_scale", "seed"),
    *("model", "model_config", "revision", "variant", "dtype", "device", "vae", "lora"),
    *("attention_backend", "scheduler", "local_files_only"),
)
_EVERY_S = 10.0


@with_options(GenerateOptions, only=_OPTIONS)
def bench_command(
    *,
    size: Size = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round of calls, one picture for each recipe.")
    ] = False,
    as_json: AsJson = False,
    **values: Any,
) -> None:
    """Measure on this machine whether merging pays for a model.

    Times calls of the UNet or transformer in turns: unpatched, under each preset, with merging that
    costs nothing to choose (oracle), and, for a UNet, under the tomesd package if it is installed.
    Then generates pictures with all steps, with fewer steps, and by each preset, and compares them:
    one of each class or prompt, by default of two classes. Writes index.html, which shows
    everything, bench.json, plot.png, contact_sheet.jpg and the pictures.

    May be stopped at any moment; the same command resumes. Nothing else should run meanwhile.
    """
    with user_errors(TypeError, ValueError):
        given = given_values(GenerateOptions, values) | read_size(values | {"size": size})
        options = GenerateOptions(**given)

    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.bench.gate import UnsoundError
    from sd_tokenmerge.bench.page import bench_tables
    from sd_tokenmerge.bench.run import PAGE, PLOT, RECORD, SHEET, run_bench

    try:
        with generation_errors(), user_errors(ValueError):
            content = run_bench(options, quick=quick, report=_TimeLeft())
    except UnsoundError as error:
        raise UserError(f"{error} Nothing was timed.", exit_code=1) from error
    except OSError as error:
        raise interruption(error) from error
    except KeyboardInterrupt as error:
        message = "interrupted. Run the same command again to continue."
        raise UserError(message, exit_code=130) from error
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        tables = [
            in_columns([table.header, *filter(None, table.body)]) for table in bench_tables(content)
        ]
        print("\n\n".join([*tables, *content["verdict"]]))
    files = ", ".join(str(Path(options.out, name)) for name in (RECORD, PLOT, SHEET, PAGE))
    print(f"Written: {files}.", file=sys.stderr)


class _TimeLeft:
    """Prints the progress and the time left, at most every few seconds."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._printed = time.monotonic()

    def __call__(self, what: str, share: float) -> None:
        from sd_tokenmerge.cli.progress import format_duration

        now = time.monotonic()
        if self._first is None:
            self._first = share, now
        first, started = self._first
        if now - self._printed < _EVERY_S or share <= first:
            return
        self._printed = now
        left = (1 - share) * (now - started) / (share - first)
        print(f"{what}: {share:.0%}, {format_duration(left)} left", file=sys.stderr)
