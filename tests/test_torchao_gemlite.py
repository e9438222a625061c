"""torchao's rows on gemlite's kernels: skipped where the two installed libraries do not fit each other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import tiny
from shapes import LLAMA_8B

from lowbit import backends
from lowbit.backends.torchao import needs
from lowbit.formats import FORMATS

ROWS = ("a16w4_uint_g128", "a16w8_uint", "a8w4_uint_g128", "a8w8_uint")
TAKEN = "class UIntxBitPackedTensor:\n    def from_hp(cls, linear):\n        {} = linear.get_tensor_args()\n"
GIVEN = """class GemLiteLinearTriton:
    def get_tensor_args(self):
        meta_scale = self.meta_scale
        if not meta_scale:
            meta_scale = 0
        return [{}]
"""


@pytest.fixture
def gemlite_and_torchao(monkeypatch, tmp_path):
    """Packages on disk with the two lines that count, as gemlite 0.5.1.post1 and 0.6.0.post2 and torchao 0.18.0 have
    them: ``pair(what torchao takes, what gemlite gives, gemlite's version)``."""

    def pair(taken, given, found):
        folder = tmp_path / f"{found}-{taken}"
        tensor = folder / "torchao/prototype/quantization/uintx/uintx_bit_packed_tensor.py"
        core = folder / "gemlite/core.py"
        for file, text in ((tensor, TAKEN.format(taken)), (core, GIVEN.format(given))):
            file.parent.mkdir(parents=True)
            file.write_text(text)
        spec = {
            name: SimpleNamespace(submodule_search_locations=[str(folder / name)]) for name in ("torchao", "gemlite")
        }
        monkeypatch.setattr(needs, "find_spec", spec.get)
        monkeypatch.setattr(needs, "version", {"gemlite": found, "torchao": "0.18.0"}.__getitem__)

    return pair


@pytest.mark.parametrize(
    ("taken", "given", "found", "reason"),
    [
        (
            *("qdata, scale, zero_point", "self.W_q, self.scales, self.zeros, meta_scale", "0.6.0.post2"),
            "package: needs gemlite < 0.6, this is 0.6.0.post2: torchao 0.18.0 takes 3 tensors of its linear "
            "(get_tensor_args), it gives 4",
        ),
        ("qdata, scale, zero_point", "self.W_q, self.scales, self.zeros", "0.5.1.post1", "None"),
        ("qdata, scale, zero_point, meta", "self.W_q, self.scales, self.zeros, meta_scale", "0.6.0.post2", "None"),
        (
            *("qdata, scale, zero_point, meta", "self.W_q, self.scales, self.zeros", "0.5.1.post1"),
            "package: needs gemlite >= 0.6, this is 0.5.1.post1: torchao 0.18.0 takes 4 tensors of its linear "
            "(get_tensor_args), it gives 3",
        ),
    ],
)
@pytest.mark.parametrize("name", ROWS)
def test_gemlite_must_give_the_tensors_that_torchao_takes(gemlite_and_torchao, name, taken, given, found, reason):
    gemlite_and_torchao(taken, given, found)
    assert str(needs.requirement(FORMATS[f"{name}-torchao"], tiny.gpu(9, 0), LLAMA_8B)) == reason


def test_the_installed_torchao_takes_three_tensors_and_every_such_row_says_so():
    """If this fails, torchao has changed: read what it takes now, and what the rows say that they need."""
    source = needs._source("torchao", "prototype/quantization/uintx/uintx_bit_packed_tensor.py")
    assert needs._tensors(source) == 3
    assert {row.name for row in FORMATS.values() if "gemlite < 0.6" in backends.needs(row)} == set(ROWS)


def test_gemlites_version_counts_after_the_device_and_where_it_is_known(gemlite_and_torchao, monkeypatch):
    gemlite_and_torchao("q, s, z", "self.W_q, self.scales, self.zeros, meta_scale", "0.6.0")
    old, new = tiny.gpu(8, 0), tiny.gpu(9, 0)
    assert str(needs.requirement(FORMATS["a8w4_uint_g128-torchao"], old, LLAMA_8B)).startswith("capability: needs SM89")
    assert (
        str(backends.unmet(FORMATS["a16w8_uint-torchao"], tiny.CPU, LLAMA_8B)) == "capability: needs cuda, this is cpu"
    )

    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(needs, "version", nothing)  # sources without metadata
    assert "this is of unknown version: torchao of unknown version takes 3" in str(
        needs.requirement(FORMATS["a16w8_uint-torchao"], new, LLAMA_8B)
    )
