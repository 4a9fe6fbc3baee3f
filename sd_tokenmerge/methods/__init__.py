"""Merging methods, by name.

Adding one: write a module with a `Method` subclass, add a row to `METHODS`; the contract test and the
command line pick it up.
"""

from __future__ import annotations

from sd_tokenmerge.methods.atc import ATC
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.parse import parse_method_string

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (ATC,)}


def parse_method(method: str | Method) -> Method:
    """A method from its string, for example `"atc:linkage=complete"`; an instance passes through.

    Raises:
        ValueError: unknown method, unknown option or bad value; the message lists what is allowed.
        TypeError: `method` is neither a string nor a `Method`.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a string or a Method, got {type(method).__name__}.")
    return parse_method_string(method, METHODS)


__all__ = ["ATC", "METHODS", "Grid", "Method", "parse_method"]
