"""The logic of the app, without gradio, on a tiny pipeline."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sd_tokenmerge import MergeConfig
from sd_tokenmerge.app.comparison import Comparison
from sd_tokenmerge.app.studio import Studio, difference
from sd_tokenmerge.fid.image_change import psnr
from sd_tokenmerge.report.clusters import draw_clusters
from sd_tokenmerge.sampling.options import GenerateOptions

PICTURE = {"seed": 3, "height": 64, "width": 64, "steps": 2}
FINEST = ("down_blocks.0", "up_blocks.3")


class Followed:
    """Records the steps of all generations; stops one of them after a number of steps."""

    def __init__(self, stop_after=None):
        self.steps, self._stop_after = [], stop_after

    def __call__(self, done, total):
        self.steps.append((done, total))
        if done == self._stop_after:
            raise InterruptedError


@pytest.fixture(scope="module")
def studio(tiny_model):
    return Studio(GenerateOptions(out="-", model=str(tiny_model), device="cpu"))


def make(studio, merging=None, follow=None, prompt="a cube", **changes):
    settings = studio.settings(merging, **PICTURE | changes)
    method = studio.unmerged if merging is None else studio.merged
    return method(prompt, settings, follow or Followed())


def pixels(picture):
    return np.asarray(picture.image)


def test_unmerged_pictures_are_kept(studio):
    follow = Followed()
    first = make(studio, follow=follow)
    assert follow.steps == [(1, 3), (2, 3), (3, 3)]  # PNDM calls the UNet once more
    for merging in (MergeConfig("grid", keep_rate=0.25), MergeConfig("random", keep_rate=0.5)):
        settings = studio.settings(merging, **PICTURE)
        assert studio.unmerged("a cube", settings, Followed(stop_after=1)) is first
    for changes in ({"seed": 4}, {"steps": 1}, {"width": 72}, {"prompt": "a ball"}):
        assert make(studio, **changes) is not first


def test_old_pictures_are_forgotten(studio, monkeypatch):
    monkeypatch.setattr("sd_tokenmerge.app.studio._CACHED_PICTURES", 2)
    image = Image.new("RGB", (64, 64))
    monkeypatch.setattr("sd_tokenmerge.app.studio.single_picture", lambda *_: (image, 1.0))
    first, second = make(studio, seed=11), make(studio, seed=12)
    make(studio, seed=13)
    assert make(studio, seed=12) is second
    assert make(studio, seed=11) is not first


class Products(TorchFunctionMode):
    """Counts products of queries and keys at the finest level while a pipeline generates."""

    def __init__(self, unet):
        super().__init__()
        self.count, self._inside, self._unet = 0, 0, unet

    def __enter__(self):
        self._stack = ExitStack()
        for name, module in self._unet.named_modules():
            if name.startswith(FINEST) and name.endswith("attn1"):
                for add, change in (
                    (module.register_forward_pre_hook, 1),
                    (module.register_forward_hook, -1),
                ):
                    hook = add(lambda *_, change=change: setattr(self, "_inside", change > 0))
                    self._stack.callback(hook.remove)
        return super().__enter__()

    def __exit__(self, *error):
        self._stack.close()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self._inside and function is scaled_dot_product_attention:
            self.count += args[0].shape[:-1].numel() * args[1].shape[-2]
        return function(*args, **(kwargs or {}))


def test_the_share_of_products_is_what_runs(studio):
    def counted(merging):
        with Products(studio._pipe.unet) as products:
            picture = make(studio, merging, seed=20)
        return picture, products.count

    _, everything = counted(None)
    for merging in (
        MergeConfig("grid", keep_rate=0.25),
        MergeConfig("grid", keep_rate=0.25, merge="kv"),
        MergeConfig("grid", keep_rate=0.25, merge="q"),
        MergeConfig("grid", keep_rate=0.25, merge="two-sided"),
        MergeConfig("grid", keep_rate="during:rate=0.25,stop=0.5"),
    ):
        picture, count = counted(merging)
        assert picture.product_share == pytest.approx(count / everything)
        assert picture.product_share < 0.75


def test_clusters_are_drawn(studio):
    picture = make(studio, MergeConfig("grid", keep_rate="during:rate=0.25,stop=0.25"))
    recording = picture.recording
    assert recording.blocks[0].startswith("down_blocks.0")
    drawing, title = picture.draw_clusters(1, 1)
    assert title == f"`{recording.blocks[0]}`, step 1 of 3, t = 501: 16 clusters of 4 to 4 tokens"
    labels = recording.steps[0].partitions[recording.blocks[0]].labels[-1, 0]
    np.testing.assert_array_equal(
        np.asarray(drawing), np.asarray(draw_clusters(picture.image, labels))
    )
    drawing, title = picture.draw_clusters(3, 2)
    assert title == f"`{recording.blocks[1]}`, step 3 of 3, t = 1: nothing was merged"
    assert drawing is picture.image


def test_a_cancelled_generation_leaves_nothing_behind(studio):
    merging = MergeConfig("grid", keep_rate=0.25)
    before = pixels(make(studio, merging))
    for config in (merging, None):
        with pytest.raises(InterruptedError):
            make(studio, config, Followed(stop_after=1), seed=30)
    np.testing.assert_array_equal(pixels(make(studio, merging)), before)
    follow = Followed()
    make(studio, follow=follow, seed=30)
    assert len(follow.steps) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 60}, "`height` must be a multiple of 8, got 60."),
        ({"steps": 2.5}, "`steps` must be an integer, got 2.5."),
        ({"merging": MergeConfig("tome", keep_rate=0.25)}, "tome"),
        ({"merging": MergeConfig("atcc")}, "`method` must be one of "),
    ],
)
def test_bad_settings_are_refused_before_anything_is_generated(studio, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        studio.settings(**PICTURE | changes)


def test_an_attention_that_cannot_be_merged(tiny_model):
    options = GenerateOptions(
        out="-", model=str(tiny_model), device="cpu", attention_backend="eager"
    )
    with pytest.raises(ValueError, match="can't be combined"):
        Studio(options).settings(MergeConfig("grid", merge="kv"), **PICTURE)


def test_missing_settings_are_those_of_the_model(studio):
    settings = studio.settings(height=None, width=None, steps=None)
    assert (settings.height, settings.width, settings.steps) == (512, 512, 50)
    assert len(studio.prompts()) == 1000


def test_differences():
    image, other = Image.new("RGB", (4, 4), (10, 100, 200)), Image.new("RGB", (4, 4), (13, 0, 200))
    assert difference(image, other).getpixel((1, 1)) == (12, 255, 0)
    error = (3**2 + 100**2) / 3
    assert psnr(image, other) == pytest.approx(10 * np.log10(255**2 / error))


def test_a_comparison(studio):
    comparison = Comparison(["grid", "tome"], ["qkv", "kv"], ["0.25"])
    titles = []

    def follow(title):
        titles.append(title)
        return Followed()

    merging = {"method": "random", "keep_rate": "0.5", "merge": "q", "refresh_every": 2}
    run = comparison.run(studio, "a cube", picture=PICTURE, merging=merging, follow=follow)
    tables = []
    for _ in run:
        tables.append(comparison.table())
        assert comparison.sheet().width > 3 * 256
    assert [len(table) for table in tables] == [2, 3, 4]
    assert titles[1:] == ["Picture 1 of 4: grid, qkv, 0.25", "Picture 2 of 4: grid, kv, 0.25"]
    assert [line[-1] for line in tables[-1][1:]] == ["100 %", "6.25 %", "25 %"]
    assert list(comparison.refused) == comparison.settings[2:]
    assert all("tome" in reason for reason in comparison.refused.values())
    config = MergeConfig("grid", keep_rate=0.25, merge="kv", refresh_every=2)
    np.testing.assert_array_equal(
        pixels(comparison.pictures[comparison.settings[1]]), pixels(make(studio, config))
    )
    with pytest.raises(ValueError, match="at least one"):
        Comparison([], ["kv"], ["0.5"])
