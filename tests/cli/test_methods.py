from __future__ import annotations

import json

import pytest

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.methods import METHODS, parse_method
from sd_tokenmerge.methods.base import Grid


@pytest.fixture
def listed(capsys) -> dict[str, dict]:
    assert run(["methods", "--json"]) == 0
    return {method["name"]: method for method in json.loads(capsys.readouterr().out)}


def test_every_method_is_listed_with_a_summary_and_a_source(listed):
    assert list(listed) == list(METHODS)
    for method in listed.values():
        assert len(method["summary"]) > 20
        assert len(method["source"]) > 20
    assert "Haurum" in listed["atc"]["source"]
    assert "Haroun" in listed["lotm"]["source"]


def test_every_option_is_explained(listed, monkeypatch, capsys):
    meanings = [option["meaning"] for method in listed.values() for option in method["options"]]
    assert len(meanings) >= 9
    assert min(map(len, meanings)) > 20
    assert all("`" not in meaning for meaning in meanings)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["methods"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(meaning in " ".join(printed.split()) for meaning in meanings)


def test_every_listed_option_can_be_written_and_its_default_is_the_default(listed):
    for name, method in listed.items():
        options = []
        for option in method["options"]:
            default = option["default"]
            options.append(f"{option['name']}={str(default).lower()}")
        text = f"{name}:{','.join(options)}" if options else name
        assert parse_method(text) == METHODS[name]()


def test_the_lowest_keep_rate_is_reachable_and_less_is_not(listed):
    grid = Grid(64, 64)
    for name, method in listed.items():
        clusters = round(method["lowest_keep_rate"] * grid.num_tokens)
        METHODS[name]().require_reachable(clusters, grid)
        with pytest.raises(ValueError, match="must be in"):
            METHODS[name]().require_reachable(clusters - 1, grid)
    assert listed["tome"]["lowest_keep_rate"] == 0.5
    assert listed["tome-sd"]["lowest_keep_rate"] == 0.25


def test_the_text_says_the_same(capsys):
    assert run(["methods"]) == 0
    paragraphs = capsys.readouterr().out.split("\n\n")
    assert [paragraph.split(":")[0] for paragraph in paragraphs] == list(METHODS)
    atc = next(p for p in paragraphs if p.startswith("atc:"))
    assert "linkage=single|complete|average (default: average)" in atc
    assert "keep rate: any; deterministic" in atc
    tome_sd = next(p for p in paragraphs if p.startswith("tome-sd:"))
    assert "keep rate: at least 0.25" in tome_sd
    assert "random=true|false (default: false)" in tome_sd
    random = next(p for p in paragraphs if p.startswith("random:"))
    assert "drawn from the merge seed" in random
