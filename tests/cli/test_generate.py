from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd_tokenmerge.cli.commands import COMMANDS, run
from sd_tokenmerge.sampling.manifest import read_manifest
from tests.tiny_models import tiny_sd15

COMMAND = [sys.executable, "-m", "sd_tokenmerge"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd15().save_pretrained(folder)
    (folder / "sample.json").write_text(
        '{"classes": [3, 18], "size": 32, "steps": 2, "guidance_scale": 3.0}'
    )
    return str(folder)


def test_generate_then_status(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["generate", "--model", model, "--method", "tome-sd", "--out", str(out)]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 4 images, 0 were there, 4 generated in ")
    assert [record.file for record in read_manifest(out)] == [
        *("3_0.png", "3_1.png"),
        *("18_0.png", "18_1.png"),
    ]

    assert run([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["already_there"] == 4
    assert "4 of 4 images are already there." in printed.err

    assert run(["status", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["folder", "method", "keep", "images", "done", "missing", "broken"]
    assert table[1].split() == ["run", "tome-sd", "0.5", "4", "4", "0", "0", "complete"]

    (out / "3_0.png").write_bytes(b"")
    assert run(["status", str(out)]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[1].split() == [
        *(str(out), "tome-sd", "0.5", "4", "3", "0", "1", "damaged")
    ]
    assert "1 x image with another content than recorded: 3_0.png" in said
    assert run(["status", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["runs"][0]["broken"] == 1


def test_all_options_reach_the_run(model: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {
        "--classes": "1,magpie",
        "--images-per-class": "1",
        "--prompt-template": "a {class}",
        "--class-names": "short",
        "--negative-prompt": "blue",
        "--seed": "3",
        "--seed-scheme": "hashed",
        "--height": "40",
        "--width": "24",
        "--steps": "1",
        "--guidance-scale": "2",
        "--method": "atc:linkage=single",
        "--keep-rate": "0.6",
        "--levels": "2",
        "--features": "keys",
        "--merge": "kv",
        "--refresh-every": "2",
        "--merge-seed": "4",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--scheduler": "DDIM",
        "--attention-backend": "math",
        "--batch-size": "2",
    }
    flags = ["--share-layers", "--proportional-attention", "--local-files-only"]
    words = [word for pair in options.items() for word in pair]
    assert run(["generate", "--model", model, "--out", str(out), *words, *flags]) == 0
    written = json.loads((out / "run.json").read_text())["options"]
    merging = written.pop("merging")
    written |= {"merge_seed" if name == "seed" else name: merging[name] for name in merging}
    options["--classes"] = "1,18"
    for name, value in options.items():
        assert str(written[name.lstrip("-").replace("-", "_")]).removesuffix(".0") == value
    for flag in flags:
        assert written[flag.lstrip("-").replace("-", "_")] is True
    assert [record.prompt for record in read_manifest(out)] == ["a goldfish", "a magpie"]


@pytest.mark.parametrize(
    ("keep_rate", "canonical", "constant"),
    [
        ("linear:first=1,last=0.5,stages=2", "linear:first=1,last=0.5,stages=2", "0.5"),
        ("1=0.5,0=depth:rate=0.7", "0=depth:rate=0.7,1=0.5", "0.7"),
    ],
)
def test_keep_rates_that_change(
    model: str,
    tmp_path: Path,
    keep_rate: str,
    canonical: str,
    constant: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["generate", "--model", model, "--method", "tome-sd", "--classes", "1"]
    out, other = str(tmp_path / "run"), str(tmp_path / "other")
    assert run([*command, "--out", out, "--keep-rate", keep_rate]) == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())["options"]["merging"]
    assert written["keep_rate"] == canonical
    with Image.open(tmp_path / "run" / "1_0.png") as picture:
        assert picture.info["keep_rate"] == canonical
    assert run([*command, "--out", other, "--keep-rate", constant]) == 0
    pictures = [{r.sha256 for r in read_manifest(folder)} for folder in (Path(out), Path(other))]
    assert not pictures[0] & pictures[1]
    capsys.readouterr()

    assert run([*command, "--out", out, "--keep-rate", canonical]) == 0  # the same run, complete
    assert run(["status", out]) == 0
    assert canonical in capsys.readouterr().out
    assert run([*command, "--out", out, "--keep-rate", constant]) == 2
    assert f'keep_rate: "{canonical}" -> "{constant}"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--out'"),
        (["--out", "run", "--class", "3"], "No such option: --class"),
        (["--out", "run", "--steps", "many"], "Invalid value for '--steps'"),
        (["--out", "run", "--keep-rate", "0"], "--keep-rate must be in (0, 1], got 0.0."),
        (["--out", "run", "--keep-rate", "50 %"], "--keep-rate must be a number in (0, 1], linear"),
        (["--out", "run", "--keep-rate", "depth:rate=0.4"], "must be in (0.5, 1], got 0.4"),
        (["--out", "run", "--keep-rate", "9=0.5"], "--keep-rate must name levels with self"),
        (["--out", "run", "--keep-rate", "0=0.5", "--levels", "2"], "--levels must be left out"),
        (
            ["--out", "run", "--keep-rate", "depth:rate=0.7", "--share-layers"],
            "--share-layers must be False with a keep rate that differs by block",
        ),
        (
            ["--out", "run", "--method", "tome-sd", "--keep-rate", "linear:first=1,last=0.1"],
            "keep rate of at least 0.25",
        ),
        (["--out", "run", "--classes", "unicorn"], "Class must be an ImageNet-1k index"),
        (["--out", "run", "--method", "magic"], "--method must be one of"),
        (["--out", "run", "--method", "tome-sd", "--keep-rate", "0.1"], "keep rate of at least"),
        (["--out", "run", "--model", "/nowhere"], "--model must exist"),
        (["--out", "run", "--model", "."], "without a model_index.json"),
        (["--out", "run", "--size", "32", "--height", "32"], "--size excludes --height"),
        (["--out", "run", "--size", "33"], "--size must be a multiple of 8, got 33."),
        (["--out", "run", "--height", "33"], "--height must be a multiple of 8, got 33."),
        (["--out", "run", "--prompt-template", "a"], "--prompt-template must contain {class}"),
        (["--out", "file/run"], "Not a directory: `"),
        (["--out", "full"], "'mine.txt' in it"),
        (["--out", "run", "--prompts", "none.txt"], "No such file or directory: `none.txt`"),
        (["--out", "run", "--shard", "0/2"], "--shard must be i/n with i from 1 to n"),
        (["--out", ""], "--out must name a folder"),
        (["--out", "run\udcff"], "--out must be valid Unicode"),
        (["--out", "run", "--prompt-template", "{class}\ud800"], "--prompt-template must be valid"),
        (["--out", "run", "--scheduler", "DDIM", "--steps", "1001"], "--steps must suit the sched"),
        (["--out", "run", "--steps", "1000000000"], "--steps must be in [1, 10000)"),
        (["--out", "run", "--size", "1000000000"], "--size must be in [8, 16384), got 1000000000"),
        (["--out", "run", "--size", "65528"], "--size must be in [8, 16384), got 65528"),
        (["--out", "run", "--device", "meta"], "--device must be available, got 'meta'"),
        (["--out", "run", "--device", "toaster"], "--device must be a torch device such as cpu"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    given = [] if "--model" in arguments else ["--model", model]
    assert run(["generate", *given, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_images_with_nan_pixels_end_with_exit_code_1_and_their_names(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["generate", "--model", model, "--method", "none", "--out", str(out)]
    assert run([*command, "--guidance-scale", "1e300"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith(
        "error: 4 of 4 images have NaN pixels and were not stored: 3_0.png, 3_1.png, 18_0.png, "
        "18_1.png. "
    )
    assert not list(out.glob("*.png"))
    assert run(["status", str(out)]) == 1
    assert "not begun" in capsys.readouterr().out
    assert run(command) == 0  # without images, the folder is free for other options


def test_an_unexpected_error_keeps_its_traceback(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_tokenmerge.sampling.run.Sampler", None)
    with pytest.raises(TypeError, match="not callable"):
        run(["generate", "--model", model, "--out", str(tmp_path / "run"), "--method", "none"])


def test_help_loads_nothing_that_takes_long() -> None:
    # Not its time, which a busy machine decides; 0.3 s on an idle one.
    script = (
        "import sys\n"
        "from sd_tokenmerge.cli.commands import COMMANDS, run\n"
        "for arguments in ([], ['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    assert run(arguments) == 0, arguments\n"
        "print({name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.count("Usage: sd-tokenmerge") == 2 + len(COMMANDS)
    loaded = ast.literal_eval(result.stderr)
    assert "typer" in loaded
    slow = {"accelerate", "diffusers", "matplotlib", "numpy", "scipy", "torch", "transformers"}
    assert not loaded & slow


def test_a_shard_says_what_part_it_is(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["generate", "--model", model, "--method", "none", "--out", str(out)]
    assert run([*command, "--shard", "2/2"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 images of shard 2/2, 0 were there, ")


@pytest.mark.parametrize("columns", ["80", "119", "120"])
@pytest.mark.parametrize("command", ["generate", "sweep"])
def test_help_cuts_nothing_off(command: str, columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    help_text = subprocess.run(
        [*COMMAND, command, "--help"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "--no-proportional-attention" in help_text
    assert "…" not in help_text
    assert max(map(len, help_text.splitlines())) <= int(columns)


def test_entry_points_are_the_same(tmp_path: Path) -> None:
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [*COMMAND, "generate", "--help"],
            [str(Path(sys.executable).with_name("sd-tokenmerge")), "generate", "--help"],
        )
    ]
    assert outputs[0].count("--keep-rate") == 1
    assert outputs[0] == outputs[1]


def test_unknown_commands_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generat"]) == 2
    assert (
        capsys.readouterr().err == "error: No such command 'generat'. See `sd-tokenmerge --help`.\n"
    )
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sd-tokenmerge ")


def test_a_full_disk_is_one_line(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sd_tokenmerge.sampling.writer.write_atomically", full)
    out = tmp_path / "run"
    assert run(["generate", "--model", model, "--method", "none", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: No space left on device: `")
    assert error.endswith("run the same command again.\n")
    assert error.count("\n") == 1
    assert not list(out.glob("*.png"))
