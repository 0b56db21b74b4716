"""Weights on the hub where it cannot be reached: one line, and no request is repeated."""

import http.server
import threading

import huggingface_hub
import pytest
import timm
from huggingface_hub import constants
from huggingface_hub.utils import _http

from dualenc import ImageConfig, ModelError, load
from dualenc.formats.download import hub_or_cache
from dualenc.formats.timm import load_image_weights
from dualenc.models import ImageEncoder


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """Point to a hub that refuses connections, and to an empty cache; a second attempt would wait before it."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("waits for another attempt"))


def weights_of_timm():
    name = "vit_tiny_patch16_224"
    assert timm.list_pretrained(name)  # the control: there are weights to download
    load_image_weights(ImageEncoder(ImageConfig(name, 224)), None)


CASES = {
    "open_clip": lambda: load("open_clip:ViT-B-32/laion2b_s34b_b79k", "cpu"),
    "open_clip on the hub": lambda: load("open_clip:hf-hub:owner/name", "cpu"),
    "timm": weights_of_timm,
    "hub": lambda: load("hf-hub:owner/name", "cpu"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_connection_is_one_line(name, unreachable, capsys, caplog):
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9 cannot be reached") as raised:
        CASES[name]()
    assert len(str(raised.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert constants.HF_HUB_OFFLINE is False


def test_other_errors_stay_what_they_are(unreachable):
    with pytest.raises(RuntimeError, match="of another kind"), hub_or_cache("weights"):
        raise RuntimeError("of another kind")
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_is_used(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        with hub_or_cache("weights"):
            assert not huggingface_hub.is_offline_mode()
    finally:
        server.shutdown()
        server.server_close()
