"""Keep other libraries' messages out of our output."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Silence import-time notices, loading bars and warnings of transformers and diffusers.

    Call before they are imported; a level that the user set in the environment stays.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
