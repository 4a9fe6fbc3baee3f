"""Components of the page made from the fields of option dataclasses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from sd_tokenmerge.keep_rates import format_keep_rates
from sd_tokenmerge.methods import METHODS
from sd_tokenmerge.options import option_types, without_none

_SWITCH = {"default": None, "on": True, "off": False}
"""Choices of an option that is on, off, or None for what suits the other options."""


class FieldComponent:
    """An option on the page.

    Attributes:
        name: the dataclass's field.
        component: shows the option.
    """

    def __init__(self, owner: type, name: str, value: Any, *, explain: bool = True) -> None:
        """Make a component for a field.

        Args:
            owner: the dataclass.
            name: the field.
            value: of the field, shown at first.
            explain: whether to show the field's help.
        """
        entry = next(entry for entry in fields(owner) if entry.name == name)
        full_hint = option_types(owner)[name]
        hint = without_none(full_hint)
        self.name = name
        self._choices = _SWITCH if hint is bool and hint is not full_hint else None
        self._is_optional_integer = hint is int and value is None
        shown = {
            "label": _label(entry),
            "info": entry.metadata["help"] if explain else None,
            "value": self.shown(value),
            "min_width": 120,
        }
        if name == "method":
            self.component = gr.Dropdown(list(METHODS), allow_custom_value=True, **shown)
        elif get_origin(hint) is Literal:
            self.component = gr.Dropdown(list(get_args(hint)), **shown)
        elif self._choices is not None:
            self.component = gr.Dropdown(list(self._choices), **shown)
        elif hint is bool:
            self.component = gr.Checkbox(**shown)
        elif hint in (int, float) and value is not None:
            self.component = gr.Number(**shown)  # turns None into 0 once it is visible
        else:
            self.component = gr.Textbox(**shown)

    def shown(self, value: Any) -> Any:
        """What the component shows for a value of the field."""
        if self.name == "keep_rate":
            return format_keep_rates(value)
        if self._choices is not None:
            return next(text for text, choice in self._choices.items() if choice is value)
        if self._is_optional_integer:
            return "" if value is None else str(value)
        return value

    def read(self, values: Mapping[Any, Any]) -> Any:
        """The value of the field.

        Args:
            values: of the page, by component.
        """
        value = values[self.component]
        if self._choices is not None:
            return self._choices[value]
        if self._is_optional_integer:
            return int(value) if value.isdecimal() else value or None
        return value


def _label(entry: Field[Any]) -> str:
    """The option's name on the command line, so that both agree."""
    flag: str = entry.metadata.get("flag", f"--{entry.name}")
    return flag.removeprefix("--").replace("-", " ").replace("_", " ")
