from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import sd_tokenmerge
from sd_tokenmerge import During, Grid, ToMeSD, apply_patch, remove_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import SpyMethod
from tests.tiny_models import call_unet, tiny_sd15, tiny_sdxl, tiny_unet

KINDS = ["sd15", "sd21", "sdxl"]
MERGED = {"sd15": 5, "sd21": 5, "sdxl": 10}
OF = {"sd15": 16, "sd21": 16, "sdxl": 28}
EVERYTHING = [
    {},
    {"features": "keys"},
    {"merge": "kv", "proportional_attention": True},
    {"refresh_every": 3, "share_layers": True},
    {"method": "random", "levels": 2},
]


def fingerprint(model):
    """All that a patch could leave behind: classes, attributes, hooks and state."""
    modules = {
        name: (type(module), sorted(module.__dict__), *hooks(module))
        for name, module in model.named_modules()
    }
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    processors = {name: id(p) for name, p in getattr(model, "attn_processors", {}).items()}
    return modules, state, processors


def hooks(module):
    return [list(value) for name, value in sorted(module.__dict__.items()) if "_hooks" in name]


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_removing_leaves_nothing_behind(kind, options):
    unet = tiny_unet(kind)
    unet.register_forward_pre_hook(lambda *_: None)  # someone else's
    before, output = fingerprint(unet), call_unet(unet, kind)
    for remove in (lambda handle: handle.remove(), lambda _: remove_patch(unet)):
        handle = apply_patch(unet, **{"method": "tome-sd", **options})
        assert fingerprint(unet) != before
        assert not torch.allclose(call_unet(unet, kind), output, atol=1e-3)
        remove(handle)
        assert fingerprint(unet) == before
        assert torch.equal(call_unet(unet, kind), output)


def test_context_manager_removes_also_after_an_error():
    unet = tiny_unet()
    before = fingerprint(unet)
    with pytest.raises(KeyError), apply_patch(unet, "tome-sd"):
        raise KeyError
    assert fingerprint(unet) == before


class TestState:
    def test_keys_and_names_stay(self):
        unet = tiny_unet()
        keys, names = list(unet.state_dict()), [type(m).__name__ for m in unet.modules()]
        apply_patch(unet, "tome-sd", refresh_every=2)
        assert list(unet.state_dict()) == keys
        assert [type(module).__name__ for module in unet.modules()] == names

    def test_saved_model_is_unpatched(self, tmp_path):
        unet = tiny_unet()
        plain = call_unet(unet)
        apply_patch(unet, "tome-sd")
        unet.save_pretrained(tmp_path)
        assert torch.equal(call_unet(UNet2DConditionModel.from_pretrained(tmp_path)), plain)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_are_patched_and_independent(self, how, tmp_path):
        unet = tiny_unet()
        unpatched, plain = fingerprint(unet), call_unet(unet)
        handle = apply_patch(unet, "tome-sd:random=true", refresh_every=2)
        merged = call_unet(unet)
        if how == "deepcopy":
            other = copy.deepcopy(unet)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(unet))
        else:
            torch.save(unet, tmp_path / "unet.pt")
            other = torch.load(tmp_path / "unet.pt", weights_only=False)
        counts = [row.times_computed for row in handle.report().rows]
        assert torch.equal(call_unet(other), merged)
        assert [row.times_computed for row in handle.report().rows] == counts
        remove_patch(other)
        assert torch.equal(call_unet(other), plain)
        modules, unpatched_modules = fingerprint(other)[0], unpatched[0]
        assert modules == unpatched_modules
        assert torch.equal(call_unet(unet), merged)
        handle.remove()
        assert fingerprint(unet) == unpatched

    def test_copy_of_a_pipeline(self):
        pipe = tiny_sd15()
        apply_patch(pipe, "tome-sd")
        other = copy.deepcopy(pipe)
        remove_patch(pipe)
        assert not torch.equal(call_unet(other.unet), call_unet(pipe.unet))
        remove_patch(other)
        assert torch.equal(call_unet(other.unet), call_unet(pipe.unet))


class TestReplacing:
    def test_second_patch_is_refused(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        with pytest.raises(RuntimeError, match=r"`pipe` is already patched.*replace=True"):
            apply_patch(unet, "tome-sd")

    def test_second_patch_replaces_the_first_where_asked(self):
        unet, expected = tiny_unet(), tiny_unet()
        before = fingerprint(unet)
        first = apply_patch(unet, "random", levels=3, refresh_every=2)
        second = apply_patch(unet, "tome-sd", replace=True)
        apply_patch(expected, "tome-sd")
        assert torch.equal(call_unet(unet), call_unet(expected))
        assert second.report().rows[0].times_computed == 1
        first.remove()  # not in force any more: nothing happens
        assert torch.equal(call_unet(unet), call_unet(expected))
        second.remove()
        assert fingerprint(unet) == before

    def test_a_bad_replacement_leaves_the_first(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        merged = call_unet(unet)
        with pytest.raises(ValueError, match="num_clusters"):
            apply_patch(unet, "tome-sd", keep_rate=0.1, replace=True)
        assert torch.equal(call_unet(unet), merged)

    def test_replace_without_a_first(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd", replace=True)
        remove_patch(unet)

    def test_removing_what_is_not_there(self):
        unet = tiny_unet()
        with pytest.raises(RuntimeError, match="`pipe` must be patched"):
            remove_patch(unet)
        handle = apply_patch(unet, "tome-sd")
        handle.remove()
        handle.remove()
        with pytest.raises(RuntimeError, match="`pipe` must be patched"):
            remove_patch(unet)
        with pytest.raises(TypeError, match="`pipe` must be a pipeline"):
            remove_patch(None)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"keep_rate": 0}, ValueError, r"`keep_rate` must be in \(0, 1\], got 0\."),
            ({"keep_rate": 1.01}, ValueError, r"`keep_rate` must be in \(0, 1\], got 1.01\."),
            ({"keep_rate": -0.5}, ValueError, "`keep_rate`"),
            ({"keep_rate": float("nan")}, ValueError, "`keep_rate`"),
            ({"keep_rate": True}, TypeError, "`keep_rate` must be a number, got True"),
            ({"keep_rate": "half"}, ValueError, "`keep_rate` must be a number .*got 'half'"),
            ({"method": "tome-ds"}, ValueError, "`method` must be one of atc, .*got 'tome-ds'"),
            ({"method": "atc:linkage=ward"}, ValueError, "linkage must be .*got 'ward'"),
            ({"method": 5}, TypeError, "`method` must be a string or a Method"),
            ({"method": ToMeSD}, TypeError, "`method` must be a string or a Method"),
            ({"levels": 0}, ValueError, "`levels` must be at least 1, got 0"),
            ({"levels": 5}, ValueError, r"`levels` must be in \[1, 4\].*got 5"),
            ({"levels": 1.0}, TypeError, "`levels` must be an integer, got 1.0"),
            ({"levels": True}, TypeError, "`levels` must be an integer, got True"),
            ({"refresh_every": 0}, ValueError, r"`refresh_every` must be in \[1, 2\^31\)"),
            ({"refresh_every": 10**30}, ValueError, r"`refresh_every` must be in \[1, 2\^31\)"),
            ({"replace": "yes"}, TypeError, "`replace` must be True or False, got 'yes'"),
            ({"keep_rte": 0.5}, TypeError, "a merging option must be one of .*got 'keep_rte'"),
            (
                {"keep_rate": During(0.5)},
                ValueError,
                "`pipe` must be a pipeline, whose scheduler knows the steps, got UNet2DCondition",
            ),
            ({"refresh_every": 2.0}, TypeError, "`refresh_every` must be an integer, got 2.0"),
            ({"share_layers": "no"}, TypeError, "`share_layers` must be True or False, got 'no'"),
            (
                {"proportional_attention": 1},
                TypeError,
                "`proportional_attention` must be True or False, got 1",
            ),
            ({"seed": -1}, ValueError, r"`seed` must be in \[0, 2\^63\), got -1"),
            ({"seed": 2**63}, ValueError, r"`seed` must be in \[0, 2\^63\)"),
            ({"features": "value"}, ValueError, "`features` must be one of input, keys, got"),
            ({"merge": "vk"}, ValueError, "`merge` must be one of qkv, kv, q, two-sided, got 'vk'"),
            ({"merge": ["kv"]}, ValueError, "`merge` must be one of qkv, kv, q"),
            (
                {"merge": "two-sided", "proportional_attention": False},
                ValueError,
                "`proportional_attention` must be True for merge='two-sided'",
            ),
            (
                {"merge": "kv", "proportional_attention": False, "first_order": True},
                ValueError,
                "`first_order` must be False, except for",
            ),
            ({"first_order": True}, ValueError, "`first_order` must be False, except for"),
            (
                {"method": "kmedoids", "merge": "kv", "first_order": True},
                ValueError,
                "`first_order` must be False for a method that represents clusters by one",
            ),
            (
                {"merge": "q", "proportional_attention": True},
                ValueError,
                "`proportional_attention` must be False for merge='q'",
            ),
            (
                {"method": "tome", "keep_rate": 0.4},
                ValueError,
                r"\[128, 256\] for tome on a 16x16 grid \(a keep rate of at least 0.5\), got 103",
            ),
            ({"method": "tome-sd", "keep_rate": 0.2}, ValueError, "at least 0.25"),
        ],
        ids=str,
    )
    def test_bad_ones_are_refused_and_nothing_is_changed(self, options, error, message):
        unet = tiny_unet()
        before = fingerprint(unet)
        with pytest.raises(error, match=message):
            apply_patch(unet, **options)
        assert fingerprint(unet) == before

    def test_reach_is_checked_at_every_merged_level(self):
        class Fine(SpyMethod):
            def smallest_num_clusters(self, grid):
                return 100 if grid == Grid(16, 16) else grid.num_tokens

        unet = tiny_unet()
        apply_patch(unet, Fine()).remove()
        with pytest.raises(ValueError, match="a 8x8 grid"):
            apply_patch(unet, Fine(), levels=2)

    def test_smallest_keep_rate(self):
        unet = tiny_unet()
        apply_patch(unet, "random", keep_rate=1e-6)
        assert call_unet(unet).isfinite().all()

    def test_options_after_the_method_are_by_name(self):
        with pytest.raises(TypeError):
            apply_patch(tiny_unet(), "tome-sd", 0.5)

    def test_method_may_be_an_instance(self):
        one, two = tiny_unet(), tiny_unet()
        apply_patch(one, ToMeSD(stride=4), keep_rate=0.5)
        apply_patch(two, "tome-sd:stride=4", keep_rate=0.5)
        assert torch.equal(call_unet(one), call_unet(two))


class TestReport:
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows(self, kind):
        unet = tiny_unet(kind)
        handle = apply_patch(unet, "tome-sd", keep_rate=0.6)
        rows = handle.report().rows
        assert [row.block for row in rows] == [site.path for site in find_sites(unet)]
        assert sum(row.merged for row in rows) == MERGED[kind]
        assert all(row.grid is None for row in rows)
        for _ in range(3):
            call_unet(unet, kind, height=16, width=24)
        grid = Grid(8, 12) if kind == "sdxl" else Grid(16, 24)
        count = grid.num_tokens
        for row in handle.report().rows:
            if row.merged:
                assert row.grid == grid
                assert (row.tokens_before, row.times_computed, row.times_reused) == (count, 3, 0)
                assert row.tokens_after == count - int(count * 0.4)
            else:
                assert row.grid is None
                assert row.times_computed == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_text(self, kind):
        unet = tiny_unet(kind)
        with apply_patch(unet, "tome-sd", keep_rate=0.6, refresh_every=4) as handle:
            call_unet(unet, kind)
        text = str(handle.report())  # also after the patch is gone
        lines = text.splitlines()
        assert lines[0].startswith(f"{MERGED[kind]} of {OF[kind]} self-attention blocks merged: ")
        assert "tome-sd, keep rate 0.6" in lines[0]
        assert "refresh_every=4" in lines[0]
        assert len(lines) == 2 + OF[kind]
        assert text.count("not merged") == OF[kind] - MERGED[kind]
        assert ("64 -> 39 " if kind == "sdxl" else "256 -> 154 ") in text

    def test_levels(self):
        unet = tiny_unet()
        for levels, merged in ((1, 5), (2, 10), (3, 15), (4, 16)):
            report = apply_patch(unet, "random", levels=levels, replace=True).report()
            assert {row.level for row in report.rows if row.merged} == set(range(levels))
            assert sum(row.merged for row in report.rows) == merged

    def test_keep_rate_one_computes_nothing(self):
        unet = tiny_unet()
        handle = apply_patch(unet, keep_rate=1.0)
        call_unet(unet)
        row = handle.report().rows[0]
        assert (row.tokens_before, row.tokens_after, row.times_computed) == (256, 256, 0)


class TestControlNet:
    def test_is_left_alone_by_a_pipelines_patch(self):
        pipe = tiny_sd15()
        pipe.controlnet = ControlNetModel.from_unet(pipe.unet)
        before = fingerprint(pipe.controlnet)
        apply_patch(pipe, "tome-sd")
        assert fingerprint(pipe.controlnet) == before

    def test_can_be_patched_itself(self):
        controlnet = ControlNetModel.from_unet(tiny_unet()).eval()
        for convolution in controlnet.controlnet_down_blocks:  # zero before training
            torch.nn.init.normal_(convolution.weight)

        def residuals():
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                return controlnet(
                    torch.randn(2, 4, 16, 16, generator=generator),
                    torch.tensor(500),
                    torch.randn(2, 77, 32, generator=generator),
                    torch.randn(2, 3, 128, 128, generator=generator),
                ).down_block_res_samples

        plain = residuals()
        with apply_patch(controlnet, "tome-sd:random=true", refresh_every=2) as handle:
            merged = residuals()
        assert sum(row.merged for row in handle.report().rows) == 2
        assert handle.report().rows[0].times_computed == 1
        assert not torch.allclose(merged[1], plain[1], atol=1e-3)
        assert all(map(torch.equal, residuals(), plain))


def test_pipelines_make_other_pictures_while_patched():
    for pipe in (tiny_sd15(), tiny_sdxl()):

        def picture(pipe=pipe):
            generator = torch.Generator().manual_seed(0)
            return pipe(
                "a dog", num_inference_steps=3, generator=generator, output_type="pt"
            ).images

        plain = picture()
        with apply_patch(pipe, "tome-sd", keep_rate=0.5) as handle:
            merged = picture()
        assert not torch.equal(merged, plain)
        calls = {row.times_computed for row in handle.report().rows if row.merged}
        assert calls == {len(pipe.scheduler.timesteps)}
        assert torch.equal(picture(), plain)


def test_public_names():
    for name in sd_tokenmerge.__all__:
        assert getattr(sd_tokenmerge, name) is not None
    assert set(sd_tokenmerge.__all__) <= set(dir(sd_tokenmerge))
    with pytest.raises(AttributeError, match="has no attribute 'apply_patches'"):
        sd_tokenmerge.apply_patches  # noqa: B018
