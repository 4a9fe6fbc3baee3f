"""The benchmark scripts: their arithmetic, their gate, and that the document shows their rows."""

from __future__ import annotations

import argparse
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import bench_memory
import bench_pipeline
import bench_quality
import bench_quality_time
import pytest
import render_benchmarks
import render_clustering
import torch
import unet_gate
from bench_pipeline import Bench
from bench_rows import MACHINE_FIELDS, append_rows, percentile, read_rows
from bench_tables import counted
from pipeline_contestants import CONTESTANTS, Contestant, Precomputed, oracle_name, rotated
from quality_settings import UNMERGED, Setting, all_settings

from sd_tokenmerge import PRESETS, apply_patch
from tests.tiny_models import call_unet, tiny_unet

ROOT = Path(__file__).resolve().parents[2]


def arguments(**changes):
    values = {
        "device": "cpu",
        "dtype": "float32",
        "batch": None,
        "contestants": ["unpatched", "oracle-qkv-50", "preset-fast", "tomesd-50"],
        "configs": Path(),
        "rounds": 1,
        "part": "unet",
    }
    return argparse.Namespace(**values | changes)


class TestRows:
    def test_are_appended_and_read(self, tmp_path):
        path = tmp_path / "new" / "rows.csv"
        append_rows(path, ("a", "b"), [{"a": 1, "b": "x, y"}])
        append_rows(path, ("a", "b"), [{"a": 2, "b": ""}])
        assert read_rows(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]

    def test_other_columns_are_refused(self, tmp_path):
        append_rows(tmp_path / "rows.csv", ("a",), [{"a": 1}])
        with pytest.raises(ValueError, match="has other columns"):
            append_rows(tmp_path / "rows.csv", ("a", "b"), [{"a": 1, "b": 2}])

    def test_percentiles_are_values(self):
        assert [percentile([5, 1, 3], f) for f in (0, 0.2, 0.5, 0.8, 1)] == [1, 1, 3, 5, 5]


def test_one_is_singular():
    assert [counted(count, "turn") for count in ("1", 1, "2", 0)] == [
        *("1 turn", "1 turn"),
        *("2 turns", "0 turns"),
    ]


class TestPipeline:
    def test_every_round_has_everyone_in_another_order(self):
        everyone = list(CONTESTANTS.values())
        orders = [rotated(everyone, number) for number in range(4)]
        assert all(sorted(o, key=everyone.index) == everyone for o in orders)
        assert len({tuple(one.name for one in order) for order in orders}) == 4

    def test_contestants_know_their_presets(self):
        assert CONTESTANTS["preset-fast"].refresh_every == PRESETS["fast"].refresh_every
        assert CONTESTANTS["atc-keys-50-refresh-10"].refresh_every == 10
        assert CONTESTANTS["tomesd-50"].refresh_every == 1

    @pytest.mark.parametrize("name", PRESETS)
    def test_each_preset_has_its_oracle(self, name):
        preset = PRESETS[name]
        bound = CONTESTANTS[oracle_name(preset.merge, preset.keep_rate)].options
        assert (bound["merge"], bound["keep_rate"]) == (preset.merge, preset.keep_rate)
        assert bound["proportional_attention"] == preset.proportional_attention

    def test_oracle_chooses_once_and_merges(self):
        unet = tiny_unet()
        plain, oracle = call_unet(unet), Precomputed()
        with apply_patch(unet, oracle, keep_rate=0.5) as handle:
            merged = call_unet(unet)
            row = handle.report().rows[0]
        assert (row.tokens_before, row.tokens_after) == (256, 128)
        assert not torch.allclose(plain, merged, atol=1e-3)
        tokens = torch.zeros(2, 256, 4)
        assert oracle(tokens, 128) is oracle(tokens, 128)
        assert oracle(tokens, 128).check().num_clusters == 128

    @pytest.mark.parametrize("part", ["unet", "self-attention"])
    def test_a_round_on_a_tiny_model(self, part, capsys):
        bench = Bench("quick", arguments(part=part))
        bench.check()
        rows = bench.run(0)
        assert [row["contestant"] for row in rows] == arguments().contestants
        for row in rows:
            assert row.keys() == set(bench_pipeline.FIELDS)
            assert row["benchmark"] == f"{part}-step"
            assert row["repeats"] == (2 if row["contestant"] == "unpatched" else 1)
            assert float(row["step_ms"]) > 0
            assert bool(row["kept_ms"]) == (row["refresh_every"] > 1)
        assert "preset-fast" in capsys.readouterr().out

    def test_the_gate_stops_what_does_nothing(self):
        @dataclass(frozen=True)
        class Idle(Contestant):
            @contextmanager
            def on(self, unet):
                yield

        bench = Bench("quick", arguments(contestants=["unpatched"]))
        bench.contestants.append(Idle("idle"))
        with pytest.raises(SystemExit, match="idle did nothing"):
            bench.check()

    def test_the_gate_stops_what_leaves_something_behind(self):
        @dataclass(frozen=True)
        class Messy(Contestant):
            @contextmanager
            def on(self, unet):
                unet.conv_out.bias.data += 1
                yield

        bench = Bench("quick", arguments(contestants=["unpatched"]))
        bench.contestants.append(Messy("messy"))
        with pytest.raises(SystemExit, match="messy leaves something behind"):
            bench.check()

    def test_the_gate_stops_what_is_not_finite(self):
        @dataclass(frozen=True)
        class Broken(Contestant):
            @contextmanager
            def on(self, unet):
                hook = unet.conv_out.register_forward_hook(lambda *call: call[-1] * math.nan)
                yield
                hook.remove()

        bench = Bench("quick", arguments(contestants=["unpatched"]))
        bench.contestants.append(Broken("broken"))
        with pytest.raises(SystemExit, match="broken is not finite"):
            bench.check()

    @pytest.mark.parametrize(("ours", "theirs"), [("tome-sd", "tomesd"), ("atc", "scikit-learn")])
    def test_the_gate_stops_twins_that_differ(self, ours, theirs, monkeypatch):
        monkeypatch.setitem(unet_gate._TWINS, ours, {"method": "random"})
        bench = Bench("quick", arguments(contestants=["unpatched"]))
        with pytest.raises(SystemExit, match=f"quick: {ours} and {theirs} differ by"):
            bench.check()


class TestQuality:
    def test_settings_have_one_name_each_and_can_be_applied(self):
        settings = all_settings()
        assert len({setting.name for setting in settings}) == len(settings)
        assert settings[0].name == UNMERGED
        given = SimpleNamespace(
            model="m", quick=False, images_per_class=1, batch_size=2, device="cpu"
        )
        for setting in settings:
            options = setting.generation(given, Path("run"))
            merging = ("method", "keep_rate", "merge", "features", "refresh_every")
            expected = replace(setting, method="none", keep_rate=1.0) if setting.tomesd else setting
            assert all(getattr(options, name) == getattr(expected, name) for name in merging)

    def test_presets_are_as_they_are(self):
        known = {setting.name: setting for setting in all_settings()}
        for name in ("balanced", "fast"):
            setting, preset = known[f"preset-{name}"], PRESETS[name]
            assert setting.keep_rate == preset.keep_rate
            assert setting.merge == preset.merge

    @pytest.mark.parametrize(("merge", "cost"), [("qkv", 0.0625), ("kv", 0.25), ("q", 0.25)])
    def test_attention_cost(self, merge, cost):
        assert Setting("", keep_rate=0.25, merge=merge).attention_cost == cost

    def test_statistics_of_the_change(self):
        images = [
            {"psnr": psnr, "ssim": ssim, "feature_distance": distance}
            for psnr, ssim, distance in ((30, 0.9, 1), (34, 0.8, 3), (math.inf, 1, 0))
        ]
        numbers = bench_quality.change_numbers(images)
        assert numbers["identical"] == 1
        assert (numbers["psnr_mean"], numbers["psnr_se"]) == (32, 2)  # sqrt(8) / sqrt(2)
        assert numbers["ssim_mean"] == pytest.approx(0.9)
        assert numbers["ssim_se"] == pytest.approx(0.1 / math.sqrt(3))
        assert numbers["feature_distance"] == pytest.approx(4 / 3)
        assert set(numbers) <= set(bench_quality.FIELDS)


class TestDocuments:
    @pytest.mark.parametrize("document", render_benchmarks.DOCUMENTS, ids=lambda path: path.name)
    def test_shows_the_committed_rows(self, document):
        text, blocks = document.read_text(), render_benchmarks.DOCUMENTS[document]
        assert render_benchmarks.render(text, ROOT / "docs" / "benchmarks", blocks) == text

    @pytest.mark.parametrize("document", render_clustering.DOCUMENTS, ids=lambda path: path.name)
    def test_shows_the_rows_of_clustering(self, document):
        text = document.read_text()
        rows = read_rows(ROOT / "docs" / "benchmarks" / "clustering.csv")
        assert render_clustering.render(text, rows) == text

    def test_a_block_too_few_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="must have the blocks"):
            render_benchmarks.render("<!-- begin quality --><!-- end quality -->", tmp_path)

    def test_without_rows(self, tmp_path):
        for blocks in render_benchmarks.DOCUMENTS.values():
            assert {make(tmp_path) for make in blocks.values()} == {"Not run."}

    def test_blocks_of_others_are_left_alone(self, tmp_path):
        other = "<!-- begin costs -->12<!-- end costs -->"
        text = f"{other} <!-- begin presets -->old<!-- end presets -->"
        blocks = {"presets": lambda _: "new"}
        text = render_benchmarks.render(text, tmp_path, blocks)
        assert text == f"{other} <!-- begin presets -->\n\nnew\n\n<!-- end presets -->"

    def test_step_times(self, tmp_path):
        row = dict.fromkeys(bench_pipeline.FIELDS, "1") | {"case": "sd15-512", "device": "a CPU"}
        row["kept_ms"] = ""
        speedups = {"unpatched": 1, "oracle-qkv-50": 1.25, "tomesd-50": 1.2, "preset-exact": 0.9}
        rows = [{**row, "contestant": "tomesd-50", "speedup": "5"}]  # measured again below
        rows += [{**row, "contestant": n, "speedup": str(one)} for n, one in speedups.items()]
        append_rows(tmp_path / "pipeline.csv", bench_pipeline.FIELDS, rows)
        text = render_benchmarks.pipeline(tmp_path)
        assert "| tomesd-50 | 1 (1 to 1) | 1 | 1.2 | 83 % | - |" in text
        assert "| preset-exact | 1 (1 to 1) | 1 | 0.9 | -56 % | - |" in text
        assert "| oracle-qkv-50 | 1 (1 to 1) | 1 | 1.25 | - | - |" in text
        assert text.count("tomesd-50") == 1

    def test_settings_stand_beside_the_oracles_of_their_run(self, tmp_path):
        row = dict.fromkeys(bench_pipeline.FIELDS, "1") | {"case": "sd15-512", "device": "a CPU"}
        row["kept_ms"] = ""
        runs = {
            "first": {"oracle-qkv-50": 3, "preset-exact": 2.5},
            "second": {"oracle-qkv-50": 1.25, "preset-exact": 1.2, "tomesd-50": 1.1},
            "third": {"oracle-qkv-50": 2, "tomesd-50": 1.6, "preset-fast": 1.8},
        }
        rows = [
            {**row, "commit": commit, "contestant": name, "speedup": str(speedup)}
            for commit, speedups in runs.items()
            for name, speedup in speedups.items()
        ]
        rows[-1]["kept_ms"] = "0.8"
        append_rows(tmp_path / "pipeline.csv", bench_pipeline.FIELDS, rows)
        second, third = render_benchmarks.pipeline(tmp_path).split("\n\n**")
        assert "commit second." in second
        assert "| preset-exact | 1 (1 to 1) | 1 | 1.2 | 83 % | - |" in second
        assert "tomesd" not in second
        assert "commit third." in third
        assert "| oracle-qkv-50 | 1 (1 to 1) | 1 | 2 | - | - |" in third
        assert "| tomesd-50 | 1 (1 to 1) | 1 | 1.6 | 75 % | - |" in third
        assert "| preset-fast | 1 (1 to 1) | 1 | 1.8 | - | 80 % |" in third

    def test_attention_says_how_much_longer_than_the_oracle_it_takes(self, tmp_path):
        row = dict.fromkeys(bench_pipeline.FIELDS, "1") | {"case": "sd15-512", "device": "a CPU"}
        row |= {"step_ms": "1000", "kept_ms": ""}
        speedups = {"unpatched": 1, "oracle-qkv-50": 4, "preset-exact": 1.25, "preset-fast": 2}
        append_rows(
            tmp_path / "attention.csv",
            bench_pipeline.FIELDS,
            [{**row, "contestant": n, "speedup": str(one)} for n, one in speedups.items()],
        )
        text = render_benchmarks.attention(tmp_path)
        assert "| oracle-qkv-50 | 1000 (1 to 1) | 1 | 0.25 | - | - | - |" in text
        assert "| preset-exact | 1000 (1 to 1) | 1 | 0.80 | 550 | 27 % | - |" in text
        assert "| preset-fast | 1000 (1 to 1) | 1 | 0.50 | - | - | - |" in text  # its oracle is not

    def test_tables_name_all_commits(self, tmp_path):
        row = dict.fromkeys(bench_memory.FIELDS, "1") | {"case": "sd15-512", "device": "a CPU"}
        rows = [{**row, "contestant": n, "commit": c} for n, c in (("one", "ab"), ("two", "cd"))]
        append_rows(tmp_path / "memory.csv", bench_memory.FIELDS, rows)
        assert "commit ab, cd." in render_benchmarks.memory(tmp_path)

    def test_quality(self, tmp_path):
        measured = [
            {"row": {"setting": "unmerged", "attention_cost": 1}, "images": []},
            *(
                {
                    "row": {
                        "setting": name,
                        "attention_cost": 0.5,
                        "keep_rate": 0.5,
                        "delta": 0.25,
                        "delta_se": 0.125,
                        **bench_quality.change_numbers(images(psnr)),
                    },
                    "images": images(psnr),
                }
                for name, psnr in (("qkv-50", 40), ("tomesd-50", 30))
            ),
        ]
        times = [bench_quality_time.row(n, [6.0, 9.0], 12, 5, 6.0) for n in ("qkv-50", "unmerged")]
        machine = dict.fromkeys(MACHINE_FIELDS, "1")
        append_rows(
            tmp_path / "quality_time.csv", bench_quality_time.FIELDS, [t | machine for t in times]
        )
        bench_quality.write_results(tmp_path, measured)
        table = render_benchmarks.quality(tmp_path)
        assert "| qkv-50 | 50 % | 42.0 (40.0 to 44.0) | 42.0 ± 1.2 | 0.900 ± 0.000 |" in table
        assert "| 0.25 ± 0.12 | 1.25 |" in table
        assert "| 0.25 ± 0.12 | - |" in table  # tomesd was not timed
        paired = render_benchmarks.paired(tmp_path)
        assert "| qkv-50 minus tomesd-50 | +10.00 ± 0.00 | 3 of 3 |" in paired
        assert (tmp_path / "quality.png").stat().st_size > 10_000
        assert render_benchmarks.presets(tmp_path) == "Not run."
        step = dict.fromkeys(bench_pipeline.FIELDS, "1") | {"case": "sd15-512"}
        step |= {"contestant": "tomesd-50", "speedup": "1.254"}
        append_rows(tmp_path / "pipeline.csv", bench_pipeline.FIELDS, [step])
        table = render_benchmarks.presets(tmp_path)
        assert "| the `tomesd` package | 50 % | 1.25x | - | 0 | +0.2 ± 0.1 |" in table
        assert "ATC as in its paper | 50 % | - | - | +10.0 ± 0.0 dB | +0.2 ± 0.1 |" in table


def images(psnr):
    return [
        {"file": f"{i}.png", "psnr": psnr + 2.0 * i, "ssim": 0.9, "feature_distance": 1.0}
        for i in range(3)
    ]
