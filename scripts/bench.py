"""Measure sd_tokenmerge on this machine; rows are appended to docs/benchmarks/.

    python scripts/bench.py clustering       time and memory of clustering tokens
    python scripts/bench.py unet             time of a UNet call, or of its merged self-attentions
    python scripts/bench.py transformer      time of one block of a transformer
    python scripts/bench.py transformer-error
                                             check of merged attention in transformers
    python scripts/bench.py quality          change to pictures, and time of denoising
    python scripts/bench.py compile          speed-up by merging under torch.compile
    python scripts/bench.py memory           memory of a UNet call
    python scripts/bench.py fid              speed of the FID evaluator

`clustering` and `unet` take `--against COMMIT`: this tree and that commit side by side. `--quick`
uses tiny sizes and stores nothing. `scripts/render.py` puts the rows into the documents.
"""

from __future__ import annotations

import argparse

from sd_tokenmerge.cli.quiet import quiet_libraries


def main(words: list[str] | None = None) -> None:
    """Run one benchmark and print its table."""
    quiet_libraries()
    from benchmarks import (
        clustering,
        compiled,
        fid,
        memory,
        quality,
        transformer,
        transformer_error,
        unet,
    )
    from benchmarks.options import apply_common_options

    benchmarks = {
        "clustering": clustering,
        "unet": unet,
        "transformer": transformer,
        "transformer-error": transformer_error,
        "quality": quality,
        "compile": compiled,
        "memory": memory,
        "fid": fid,
    }
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in benchmarks.items():
        command = commands.add_parser(name, description=benchmark.__doc__, formatter_class=layout)
        benchmark.add_options(command)
    arguments = parser.parse_args(words)
    apply_common_options(arguments)
    print(benchmarks[arguments.benchmark].run(arguments))


if __name__ == "__main__":
    main()
