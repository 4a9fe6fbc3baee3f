from __future__ import annotations

import errno
import inspect
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from sd_tokenmerge.cli import sweep as cli_sweep
from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.cli.generate import generate_command
from sd_tokenmerge.cli.sweep import parse_keep_rates, parse_methods, sweep_command
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.run import RunStopped
from tests.fid.toy import use_toy_extractor
from tests.report.html_document import parse
from tests.tiny_models import tiny_sd15


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd15().save_pretrained(folder)
    (folder / "sample.json").write_text(
        '{"classes": [3, 18], "size": 32, "steps": 1, "guidance_scale": 3.0}'
    )
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reference")
    for i in range(15):
        Image.linear_gradient("L").rotate(24 * i).convert("RGB").save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    use_toy_extractor(tmp_path, monkeypatch)


@pytest.fixture
def command(model, reference, tmp_path) -> list[str]:
    """Two methods at two keep rates, two images each."""
    return [
        *("sweep", "--model", model, "--out", str(tmp_path / "demo")),
        *("--methods", "tome-sd", "--methods", "random", "--keep-rates", "70%,50%"),
        *("--images-per-class", "1", "--reference", reference, "--extractor", "toy"),
    ]


def test_the_whole_job(command, tmp_path, capsys):
    demo = tmp_path / "demo"
    assert run(command) == 0
    out, error = capsys.readouterr()
    assert out == (demo / "table.md").read_text()
    assert "| method " in out
    assert error.splitlines()[-1].startswith(f"10 images generated; results in {demo}: table.md")
    for name in ("distance.png", "change.png", "contact_sheet.jpg", "side_by_side.png"):
        with Image.open(demo / name) as picture:
            picture.verify()
    page = parse((demo / "index.html").read_bytes())
    assert len(page.attributes("img", "src")) == 4
    assert {"Distance to the reference", "All settings"} < {*page.attributes("img", "alt")}
    assert {"tome-sd", "random"} < {*page.texts("th")}
    versions = json.loads((demo / "table.json").read_text())["conditions"]
    assert {versions["torch"], versions["model"]} < {*page.texts("dd")}

    written = {p: p.read_bytes() for p in demo.iterdir() if p.is_file()}
    assert run(command) == 0
    again, error = capsys.readouterr()
    assert again == out
    assert "0 images generated; results in" in error
    assert {p: p.read_bytes() for p in demo.iterdir() if p.is_file()} == written

    (demo / "runs" / "random_keep-0.5" / "3_0.png").unlink()
    assert run(["status", str(demo)]) == 1
    capsys.readouterr()
    assert run(command) == 0
    assert "1 image generated; results in" in capsys.readouterr().err
    assert run(["status", str(demo)]) == 0
    capsys.readouterr()

    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["method"] == "none"


def test_a_dry_run_prints_the_plan_and_writes_nothing(command, tmp_path, capsys):
    assert run([*command, "--dry-run"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["setting", "images", "there", "missing", "time"]
    assert table[1].split() == ["unmerged", "2", "0", "2", "?"]
    assert len(table) == 1 + 5 + 2
    assert table[-2] == "Each image: 32x32 pixels, 1 step, guidance 3."
    assert table[-1] == "To generate: 10 images (time unknown: this sweep has no image yet)."
    assert not (tmp_path / "demo").exists()
    assert not (tmp_path / "cache").exists()

    assert run(command) == 0
    capsys.readouterr()
    (tmp_path / "demo" / "runs" / "random_keep-0.5" / "3_0.png").unlink()
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["missing"] == 1
    assert plan["runs"][-1] == {
        "setting": "random, 50 %",
        "folder": str(tmp_path / "demo" / "runs" / "random_keep-0.5"),
        "images": 2,
        "there": 1,
        "missing": 1,
        "seconds": plan["seconds"],
        "replaced": False,
    }
    records = read_manifest(tmp_path / "demo" / "runs" / "random_keep-0.5")
    assert plan["seconds"] == median(record.seconds for record in records)
    assert run([*command, "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("To generate: 1 image, about ")
    assert last.endswith(" in one process at the speed so far.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-rates", "0"], "--keep-rates must be in (0, 1], got 0.0"),
        (["--keep-rates", "70"], "must be in (0, 1] or have a percent sign, got '70'"),
        (
            ["--keep-rates", "linear:first=1,last=0.5"],
            "a table has a column for each number, and `generate` takes keep rates that change",
        ),
        (["--keep-rates", "0=0.5,1=0.8"], "must be numbers such as 0.7 or 70%, got '0=0.5'"),
        (["--keep-rates", "half"], "must be numbers such as 0.7 or 70%, got 'half'"),
        (["--keep-rates", "150%"], "--keep-rates must be in (0, 1], got 1.5"),
        (["--keep-rates", "0.7", "--keep-rates", "70%"], "--keep-rates must hold each entry once"),
        (["--methods", "atk"], "--methods must be one of atc"),
        (["--methods", "random"], "--methods must hold each entry once"),
        (["--methods", "tome", "--keep-rates", "0.3"], "--skip-unreachable leaves it out"),
        (["--classes", "unicorn"], "unicorn"),
        (["--reference", "/nowhere"], "--reference must be a folder of images or an .npz file"),
        (["--extractor", "vgg"], "--extractor must be one of"),
        (["--model", "/nowhere/model"], "--model must be"),
        (["--images-per-class", "0"], "--images-per-class must be in [1, 2^24)"),
        (["--levels", "7"], "--levels must be in [1, 4]"),
        (["--out", f"{__file__}/sweep"], "Not a directory"),
        (["--sheet-images", "0"], "--sheet-images must be at least 1"),
        (["--no-such-option"], "No such option"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_input_is_one_line_and_exit_code_2(
    command, tmp_path, options, message, dry_run, capsys
):
    assert run([*command, *options, *(["--dry-run"] if dry_run else [])]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "demo").exists()


def test_methods_are_separated_by_spaces_or_semicolons():
    entries = ["atc:linkage=single tome-sd:stride=4,random=true", "random;grid; lotm "]
    assert parse_methods(entries) == (
        "atc:linkage=single",
        "tome-sd:stride=4,random=true",
        "random",
        "grid",
        "lotm",
    )


def test_keep_rates_are_fractions_or_percentages():
    assert parse_keep_rates(["0.7,50%", "40% 12.5%", ".3"]) == (0.7, 0.5, 0.4, 0.125, 0.3)
    percents = parse_keep_rates([f"{i}%" for i in range(1, 101)])
    assert percents == tuple(float(f"{i / 100:.2f}") for i in range(1, 101))


def test_every_generation_option_but_those_the_sweep_sets_is_there():
    own = inspect.signature(sweep_command).parameters
    shared = inspect.signature(generate_command, eval_str=True).parameters
    missing = set(shared) - set(own)
    assert missing == {"method", "keep_rate"}
    for name in set(shared) - {"out", "method", "keep_rate", "overwrite", "as_json"}:
        assert own[name].default == shared[name].default, name


def test_generation_options_reach_the_runs(command, tmp_path, capsys):
    options = ["--merge", "kv", "--proportional-attention", "--seed", "5", "--steps", "2"]
    assert run([*command, *options]) == 0
    runs = tmp_path / "demo" / "runs"
    merged = json.loads((runs / "random_keep-0.5" / "run.json").read_text())["options"]
    merging = merged["merging"]
    assert (merging["merge"], merging["proportional_attention"]) == ("kv", True)
    assert (merging["method"], merging["keep_rate"]) == ("random", "0.5")
    assert (merged["seed"], merged["steps"]) == (5, 2)
    unmerged = json.loads((runs / "unmerged" / "run.json").read_text())["options"]
    assert unmerged["merging"] is None
    assert (unmerged["seed"], unmerged["steps"]) == (5, 2)
    table = capsys.readouterr().out
    assert "merge kv; proportional attention true" in table


def test_the_time_left_is_that_of_the_settings_made_so_far(monkeypatch, capsys):
    console, clock = cli_sweep._SweepConsole(), iter([100.0, 160.0, 280.0])
    monkeypatch.setattr(cli_sweep.time, "monotonic", lambda: next(clock))
    for number in (3, 4, 5):  # those before were there already
        console.generating("random", number, 10)
    assert capsys.readouterr().err.splitlines() == [
        "3 of 10 settings done, 7 min 00 s left.",
        "4 of 10 settings done, 9 min 00 s left.",
    ]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli_sweep.time, "monotonic", lambda: 400.0)
    console.generating("random", 6, 10)
    assert capsys.readouterr().err == ""


def test_a_stopped_sweep_says_how_to_go_on(command, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise RunStopped("stopped after the current batch. Run the same command again to continue.")

    monkeypatch.setattr("sd_tokenmerge.sweep.run.generate", stop)
    assert run(command) == 130
    assert "Run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_full_disk_is_no_bad_input(command, monkeypatch, capsys, number, code):
    def fail(*args, **kwargs):
        raise OSError(number, "No space left on device", "x.png")

    monkeypatch.setattr("sd_tokenmerge.sweep.run.generate", fail)
    assert run(command) == code
    error = capsys.readouterr().err
    assert "`x.png`" in error.splitlines()[-1]
    assert ("run the same command" in error) is (code == 1)


def test_help_imports_no_torch():
    code = (
        "import sys; from sd_tokenmerge.cli.commands import run; run(['sweep', '--help']); "
        "run(['sites', '--help']); run(['methods', '--help']); "
        "assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules), 'slow'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--published" in result.stdout
    assert Path(cli_sweep.__file__).name == "sweep.py"
