from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sd_tokenmerge.fid import inception_weights
from sd_tokenmerge.fid.inception_weights import (
    ENVIRONMENT_VARIABLE,
    PUBLIC_FILES,
    WeightFile,
    WeightsError,
    download_inception_weights,
    find_inception_weights,
    hub_folder,
    verify_inception_weights,
)

CONTENT = bytes(range(256)) * 9000


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_search_order(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_folder() == hub
    hub.mkdir(parents=True)
    for file in reversed(PUBLIC_FILES):
        (hub / file.name).write_bytes(b"x")
        assert find_inception_weights() == hub / file.name
    named, argument = tmp_path / "named.pth", tmp_path / "argument.pth"
    named.write_bytes(b"x")
    argument.write_bytes(b"x")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(named))
    assert find_inception_weights() == named
    assert find_inception_weights(argument) == argument


def test_missing_weights_say_what_to_do(hub: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_inception_weights()
    message = str(caught.value)
    for part in (PUBLIC_FILES[0].name, PUBLIC_FILES[0].url, str(hub), ENVIRONMENT_VARIABLE):
        assert part in message
    assert "`download_weights`" in message


def test_a_named_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="`weights` must name an existing file, got '/no/file'"):
        find_inception_weights("/no/file")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/no/file")
    with pytest.raises(WeightsError, match=ENVIRONMENT_VARIABLE):
        find_inception_weights()


def test_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PUBLIC_FILES[0].name
    path.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(WeightsError, match=f"begins with {digest[:8]}, expected 6726825d"):
        verify_inception_weights(path)
    assert verify_inception_weights(path, allow_unknown=True) == digest
    monkeypatch.setattr(inception_weights, "PUBLIC_FILES", (WeightFile("a", "b", digest, 1),))
    assert verify_inception_weights(path) == digest


def test_public_names_tell_the_checksum() -> None:
    for file in PUBLIC_FILES:
        assert len(file.sha256) == 64
        if file.name.endswith(".pth"):
            assert f"-{file.sha256[:8]}." in file.name
        assert file.url.endswith(file.name)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def public(url: str) -> WeightFile:
    return WeightFile("net.pth", url, hashlib.sha256(CONTENT).hexdigest(), 2.3)


def test_download_is_complete_and_not_repeated(server: str, hub: Path) -> None:
    path = download_inception_weights(public(f"{server}/ok"))
    assert path == hub / "net.pth"
    assert path.read_bytes() == CONTENT
    again = download_inception_weights(public("http://127.0.0.1:9/nowhere"))
    assert again == path


@pytest.mark.parametrize(
    ("page", "message"), [("missing", "404|Not Found"), ("cut", "sent|cannot be downloaded")]
)
def test_a_failed_download_leaves_nothing(page: str, message: str, server: str, hub: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        download_inception_weights(public(f"{server}/{page}"))
    assert list(hub.iterdir()) == []


def test_a_wrong_file_is_not_kept(server: str, hub: Path) -> None:
    wrong = WeightFile("net.pth", f"{server}/ok", "0" * 64, 2.3)
    with pytest.raises(WeightsError, match="expected 0000"):
        download_inception_weights(wrong)
    assert list(hub.iterdir()) == []


def test_an_unreachable_server_is_one_clear_error(hub: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be downloaded .*; fetch it elsewhere"):
        download_inception_weights(public("http://127.0.0.1:9/nowhere"))
    assert list(hub.iterdir()) == []
