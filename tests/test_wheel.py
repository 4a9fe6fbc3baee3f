"""The wheel in an environment without the checkout: the sample pipeline comes with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command, cwd, **changes):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | changes,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The scripts of an environment with the wheel and, of this environment, the libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    bin = folder / "env" / "bin"
    # Folders that a .pth file adds are searched, but their own .pth files, which would lead to the
    # checkout, are not read.
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(libraries))
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", bin / "python", *install, cwd=folder)
    return bin


def test_it_is_not_the_checkout(environment, tmp_path):
    script = (
        "import importlib.metadata as m, sd_tokenmerge as s, json;"
        "print(json.dumps([s.__file__, s.__version__, m.version('sd-tokenmerge'),"
        " [str(f) for f in m.files('sd-tokenmerge')]]))"
    )
    output = run(environment / "python", "-c", script, cwd=tmp_path)
    file, version, of_metadata, files = json.loads(output)
    assert Path(file).is_relative_to(environment.parent)
    assert version == of_metadata
    for suffix in ("py.typed", "imagenet_classes.csv", "licenses/LICENSE"):
        assert sum(name.endswith(suffix) for name in files) == 1


def test_it_generates_without_a_model(environment, tmp_path):
    few = ["--steps", "2", "--classes", "ladybug", "--images-per-class", "1"]
    run(environment / "sd-tokenmerge", "generate", *few, "--out", "run", cwd=tmp_path)
    with Image.open(tmp_path / "run" / "301_0.png") as picture:
        assert picture.size == (256, 256)
    model = json.loads((tmp_path / "run" / "run.json").read_text())["options"]["model"]
    assert Path(model).is_relative_to(environment.parent)


def test_it_demonstrates_itself_offline(environment, tmp_path):
    output = run(environment / "sd-tokenmerge", "demo", cwd=tmp_path, HF_HUB_OFFLINE="1")
    files = [line for line in output.splitlines() if line.startswith("demo/")]
    assert {"demo/contact_sheet.png", "demo/table.md", "demo/clusters_fast.gif"} <= set(files)
    assert all((tmp_path / file).stat().st_size for file in files)
