"""Keep other libraries' messages out of our output."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Silence notices, loading bars and warnings of transformers and diffusers.

    Call it before importing them, since some notices appear on import. A level that the user has
    set in the environment stays.
    """
    chosen = {name: name in os.environ for name in _VERBOSITY}
    for name in _VERBOSITY:
        os.environ.setdefault(name, "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    for name, library in zip(_VERBOSITY, (transformers, diffusers), strict=True):
        library.utils.logging.disable_progress_bar()
        if not chosen[name]:
            library.utils.logging.set_verbosity_error()


_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
