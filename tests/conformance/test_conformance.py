"""Every pipeline of diffusers with a UNet is merged, or refused by `apply_patch`.

outcomes.json says which; `python -m tests.conformance.outcomes` records it.
"""

from __future__ import annotations

import pytest

from tests.conformance.discovery import attention_processors, unet_pipelines
from tests.conformance.outcomes import NOT_RUN, observe_pipeline, observe_processor, read_table

TABLE = read_table()
IN_DEFAULT_SUITE = {
    "AttnProcessor2_0",
    "CrossAttnStoreProcessor",
    "CustomDiffusionAttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionSAGPipeline",
    "StableDiffusionXLPipeline",
    "TextToVideoZeroPipeline",
}
RUN = [name for name, outcome in TABLE["pipelines"].items() if NOT_RUN not in str(outcome)]


@pytest.mark.parametrize(
    ("kind", "found"), [("pipelines", unet_pipelines), ("processors", attention_processors)]
)
def test_all_that_diffusers_has_is_in_the_table(kind, found):
    assert set(TABLE[kind]) == set(found()), (
        "the installed diffusers has other classes than outcomes.json: run "
        "`python -m tests.conformance.outcomes`, then `python scripts/render.py`"
    )


def mostly_slow(names):
    return [
        name if name in IN_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow(RUN))
def test_pipelines_do_what_the_table_says(name):
    assert observe_pipeline(name) == TABLE["pipelines"][name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow(TABLE["processors"]))
def test_processors_do_what_the_table_says(name):
    assert observe_processor(name) == TABLE["processors"][name]
