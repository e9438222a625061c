from __future__ import annotations

import socket
import zipfile

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from lowbit import embedded, texts
from lowbit.errors import LowbitError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that can't be reached, and an empty cache."""
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError("no route to host")

    def download(repo, name, *, repo_type, local_files_only):
        assert local_files_only
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_the_embedded_model_and_dummy_weights_are_scored_on_the_embedded_text(hub):
    expected = texts.Source("embedded", embedded.WINDOW, None)
    assert texts.choose_source("embedded", "auto", 4096, None) == expected
    assert texts.choose_source("llama-3.1-8b", "dummy", 131072, None) == expected
    assert expected.protocol == "embedded_512"
    assert hub == []


def test_a_text_beside_dummy_weights_is_refused(tmp_path):
    with pytest.raises(LowbitError, match="--text needs real weights"):
        texts.choose_source("llama-3.1-8b", "dummy", 131072, tmp_path / "a.txt")


def test_a_given_text_names_the_protocol_and_the_window_fits_the_model(tmp_path):
    assert texts.choose_source("a-model", "auto", 131072, tmp_path / "my story.txt").protocol == "my_story_2048"
    assert texts.choose_source("a-model", "auto", 512, tmp_path / "story.txt").protocol == "story_512"
    assert texts.choose_source("a-model", "auto", 131072, tmp_path / "wiki.test.raw").protocol == "wikitext2_2048"
    assert texts.choose_source("embedded", "auto", 4096, tmp_path / "story.txt").protocol == "story_512"


def test_without_a_network_it_is_asked_once_and_the_embedded_text_is_taken(hub):
    assert texts.choose_source("a-model", "auto", 131072, None) == texts.Source("embedded", 2048, None)
    assert hub == [("hub.example", 443)]


def test_offline_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert texts.find_wikitext2() is None
    assert hub == []


def test_the_archive_is_unpacked_once(hub, monkeypatch, tmp_path):
    archive = tmp_path / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("wikitext-2-raw/wiki.test.raw", " = Robert Boulter = \n")
        files.writestr("wikitext-2-raw/wiki.valid.raw", " = Homarus gammarus = \n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(archive))
    found = texts.find_wikitext2()
    assert found == tmp_path / "lowbit" / "wiki.test.raw"
    assert found.read_text() == " = Robert Boulter = \n"
    assert texts.find_wikitext2() == found
    assert sorted(path.name for path in found.parent.iterdir()) == ["wiki.test.raw", "wiki.valid.raw"]
    assert found.with_name("wiki.valid.raw").read_text() == " = Homarus gammarus = \n"


def test_without_a_tokenizer_quality_says_what_is_missing():
    with pytest.raises(LowbitError, match="needs the model's tokenizer"):
        texts.Source("embedded", 512, None).load(None)
