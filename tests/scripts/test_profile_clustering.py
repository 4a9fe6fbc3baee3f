"""The profile of clustering."""

from __future__ import annotations

import re

import torch
from profile_clustering import DOCUMENT, KINDS, OTHERS, PART, tabulate


def test_shares_of_a_column_add_up():
    threads = torch.get_num_threads()
    table = tabulate("average", 64, [8, 16])
    assert torch.get_num_threads() == threads
    assert "| average, white tokens | 2 x 64 x 8 | 2 x 64 x 16 |" in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[4:]]
    assert [row[0] for row in rows[:-1]] == [*KINDS, OTHERS]
    for column in (1, 2):
        shares = [int(re.fullmatch(r"(\d+) %", row[column])[1]) for row in rows[:-1]]
        assert abs(sum(shares) - 100) <= 3  # each is rounded
        assert shares[0] > 0
        assert int(rows[-1][column].replace(",", "")) > 10


def test_the_document_has_a_place_for_it():
    assert len(PART.findall(DOCUMENT.read_text("utf-8"))) == 1
