from __future__ import annotations

import sys
from socket import create_server

import pytest

from sd_tokenmerge.cli.commands import run


def test_missing_gradio_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(["app"]) == 2
    assert capsys.readouterr().err == "error: the app needs gradio: pip install gradio\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port"),
        (["--model", "nowhere"], "--model"),
        (["--dtype", "int8"], "--dtype must be one of"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    pytest.importorskip("gradio", reason="the extra app is not installed")
    assert run(["app", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_an_address_that_cannot_be_served_is_one_line(capsys):
    with create_server(("127.0.0.1", 0)) as busy:
        test_errors_are_one_line(capsys, ["--port", str(busy.getsockname()[1])], "already in use")
    test_errors_are_one_line(capsys, ["--host", "198.51.100.1"], "('198.51.100.1', 0)")
