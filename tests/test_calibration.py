from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import add_tokenizer, save

from lowbit import backends, calibration, embedded, models, quantized, texts
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

CPU = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
STORIES = texts.Source("embedded", 512, None)


@pytest.fixture(scope="module")
def host():
    return models.load(models.choose("embedded", "auto", CPU, {}))


def test_stories_are_neither_the_scored_text_nor_the_training(host):
    found = calibration.tokens(host, STORIES, 16)
    assert (found.shape, found.dtype) == ((16, 512), torch.int64)
    assert torch.equal(found, calibration.tokens(host, STORIES, 16))
    paragraphs = set(host.tokenizer.decode(found.flatten()).split("\n"))
    heldout = set(embedded.heldout_text().split("\n"))
    same = [line for line in paragraphs & heldout if len(line) > 60]
    assert same == []
    assert embedded.corpus.HELDOUT_SEED != calibration.SEED != embedded.corpus.TRAINING_SEED


def test_wikitext2_is_calibrated_on_its_validation_set(host, tmp_path):
    source = texts.Source("wikitext2", 64, tmp_path / "wiki.test.raw")
    stories = calibration.tokens(host, source, 2)  # no validation set beside it
    (tmp_path / "wiki.valid.raw").write_text("the old miller sang\n" * 100)
    found = calibration.tokens(host, source, 2)
    assert not torch.equal(found, stories)
    assert "miller sang" in host.tokenizer.decode(found[0])
    with pytest.raises(LowbitError, match=r"calibration needs 999 windows of 64 tokens, the text has \d+"):
        calibration.tokens(host, source, 999)


def test_dummy_weights_get_any_tokens():
    dummy = SimpleNamespace(load_format="dummy", tokenizer=None, config=SimpleNamespace(vocab_size=100))
    found = calibration.tokens(dummy, STORIES, 3)
    assert found.shape == (3, 512)
    assert 0 <= found.min() <= found.max() < 100


def test_without_a_tokenizer_it_says_what_is_missing(tmp_path):
    folder = save(tmp_path / "tiny")
    loaded = models.load(models.choose(str(folder), "auto", CPU, {}))
    with pytest.raises(LowbitError, match=r"needs the model's tokenizer \(tokenizer.json\)"):
        calibration.tokens(loaded, STORIES, 1)
    add_tokenizer(folder)
    assert calibration.tokens(models.load(models.choose(str(folder), "auto", CPU, {})), STORIES, 1).shape == (1, 512)


def test_a_calibrated_row_is_calibrated_whole_before_it_is_quantized(host, monkeypatch):
    calls = []

    class Backend:
        def calibrate(self, model, fmt, tokens):
            assert type(model.model.layers[-1].mlp.up_proj) is torch.nn.Linear
            calls.append(("calibrate", tuple(tokens.shape)))

        def quantize(self, module, fmt, dtype):
            calls.append(("quantize", len(list(backends.targets(module, fmt)))))

    fmt = replace(FORMATS["a16w8-torchao"], calibration_windows=2)
    monkeypatch.setattr(backends, "get", lambda name: Backend())
    monkeypatch.setattr(quantized.coverage, "inspect", lambda model, fmt: None)
    with pytest.raises(LowbitError, match=r"a16w8-torchao is calibrated: build.* needs tokens"):
        quantized.build(host, fmt, CPU)
    quantized.build(host, fmt, CPU, calibration.tokens(host, STORIES, 2))
    assert calls == [("calibrate", (2, 512)), ("quantize", 28)]
    plain = quantized.needed_mib(replace(fmt, calibration_windows=0), host.config)
    assert quantized.needed_mib(fmt, host.config) > plain + 3
