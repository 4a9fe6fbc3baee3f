import os

import pytest

from sd_tokenmerge.machine import processor_name, usable_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to take cores away")
def test_only_cores_that_may_be_used_are_counted():
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
        assert processor_name().endswith("(1 core)")
    finally:
        os.sched_setaffinity(0, before)


def test_the_processor_has_a_name():
    assert len(processor_name().partition(" (")[0]) > 2
