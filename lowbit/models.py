"""Which model is measured: chosen by name, folder or hub id, then read once into host memory (HostModel)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import checkpoint, formats, hub
from lowbit.errors import LowbitError, unknown
from lowbit.formats import stored
from lowbit.hostmodel import HostModel, Progress, silent
from lowbit.loading import load_dummy, load_folder, read_headers
from lowbit.presets import EMBEDDED, LLAMA_8B_IDS, PRESETS, Preset

if TYPE_CHECKING:
    from lowbit.device import Device

__all__ = ["LOAD_FORMATS", "PRESETS", "Choice", "HostModel", "Preset", "Progress", "choose", "load"]

LOAD_FORMATS = ("auto", "dummy")

ROOM_MIB = 2048
"""Beside bf16 weights, for the KV cache, activations and the CUDA context, when ``auto`` looks for what fits a card."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Choice:
    """A model that was chosen and not yet loaded.

    ``name`` is safe in a file name and the key of its baselines. ``source`` is the local folder, if it is one
    already; ``hub_id`` the id to download from. ``load_format`` is what will be done: ``auto`` reads real weights,
    ``dummy`` makes random ones. ``why`` is a sentence for the user. ``config`` is its LlamaConfig.
    """

    name: str
    source: Path | None
    load_format: str
    why: str
    config: Any = field(repr=False, compare=False)
    hub_id: str | None = None
    cache: Path | None = field(default=None, repr=False, compare=False)

    @cached_property
    def parameters(self) -> int:
        """How many; a tied head counts once."""
        return sum(map(math.prod, checkpoint.parameter_shapes(self.config).values()))


def choose(option: str, load_format: str, device: Device, env: Mapping[str, str] | None = None) -> Choice:
    """The model that ``--model option --load-format load_format`` names. Reads configs, no weights.

    A preset's name, a folder (anything that exists, or starts like a path), a hub id (anything else with a slash), or
    ``auto``: LOWBIT_MODEL if set; on a GPU a Llama-3.1-8B of the local hub cache, else the largest Llama preset that
    fits the card, with dummy weights; without a GPU the embedded model. ``env`` defaults to the process's.
    A checkpoint that is quantized already brings its own row into the table of formats. Raises LowbitError for
    anything else, listing what is known.
    """
    choice = _choose(option, load_format, device, env)
    how = stored.read(choice.config, choice.name)
    if how is not None and choice.load_format == "dummy":
        raise LowbitError(
            f"--load-format dummy makes unquantized weights, but {choice.name} is quantized already ({how}): leave "
            "the option out, or name a preset"
        )
    if how is not None:
        for row in stored.as_rows(how):
            formats.register(row)
    return choice


def _choose(option: str, load_format: str, device: Device, env: Mapping[str, str] | None) -> Choice:
    env = os.environ if env is None else env
    if load_format not in LOAD_FORMATS:
        raise unknown("load format", load_format, LOAD_FORMATS)
    if option != "auto":
        return _named(option, load_format, f"--model {option}", env)
    if name := env.get("LOWBIT_MODEL", ""):
        if name == "auto":
            raise LowbitError("LOWBIT_MODEL=auto says nothing: name a preset, a folder or a hub id, or unset it")
        return _named(name, load_format, f"LOWBIT_MODEL={name}", env)
    if device.kind != "cuda":
        return _named(EMBEDDED, load_format, "no GPU here, so the embedded model", env)
    return _for_gpu(load_format, device, env)


def _for_gpu(load_format: str, device: Device, env: Mapping[str, str]) -> Choice:
    absent = "--load-format dummy asks for no real weights"
    if load_format == "auto":
        cache = hub.cache_folder(env)
        if found := hub.find_cached(LLAMA_8B_IDS, cache):
            hub_id, folder = found
            name = _preset_name(hub_id) or slug(hub_id)
            why = f"{hub_id} is in the local Hugging Face cache ({cache})"
            return Choice(name, folder, "auto", why, checkpoint.read_config(folder), hub_id)
        absent = f"no Llama-3.1-8B in the local Hugging Face cache ({cache})"
    total = device.total_mib or 0
    choices = [_named(name, "dummy", "", env) for name, preset in PRESETS.items() if preset.hub_id]
    fitting = [choice for choice in choices if choice.parameters * 2 / 2**20 + ROOM_MIB <= total]
    if not fitting:
        return _named(EMBEDDED, load_format, f"{absent}, and no Llama preset fits {total:.0f} MiB in bf16", env)
    largest = max(fitting, key=lambda choice: choice.parameters)
    why = f"{absent}, so the largest Llama preset that fits {total:.0f} MiB in bf16, with dummy weights"
    return Choice(largest.name, None, "dummy", why, largest.config, largest.hub_id)


def _named(option: str, load_format: str, why: str, env: Mapping[str, str]) -> Choice:
    cache = hub.cache_folder(env)
    name = _preset_name(option) or option
    if preset := PRESETS.get(name):
        if preset.values is None:
            from lowbit import embedded  # its folder holds megabytes; nothing else needs it

            folder = embedded.load_path()
            return Choice(name, folder, load_format, why, checkpoint.read_config(folder))
        config = checkpoint.make_config(preset.values, f"preset {name}")
        return Choice(name, None, load_format, why, config, preset.hub_id, cache)
    folder = Path(option).expanduser()
    if (option and folder.exists()) or option.startswith((".", "/", "~")):
        config = checkpoint.read_config(folder)
        if load_format == "auto":
            read_headers(folder, config)  # what is missing or cut short is told before anything is measured
        return Choice(slug(_folder_name(folder.resolve())), folder, load_format, why, config)
    if "/" not in option:
        raise LowbitError(
            f"{unknown('model', option, [*PRESETS, 'auto'])}; or give a folder, or a hub id such as org/name"
        )
    if not _HUB_ID.fullmatch(option):
        raise LowbitError(f"--model {option!r}: no such folder, and no hub id either (expected org/name)")
    config = checkpoint.read_config(hub.download(option, cache, config_only=True))
    return Choice(slug(option), None, load_format, why, config, option, cache)


def load(choice: Choice, progress: Progress = silent, *, pin: bool = False) -> HostModel:
    """Read (or make) the weights, once, into host memory; ``pin`` page-locks them for a CUDA device at once.

    Raises LowbitError for a folder whose files don't make a whole Llama, and for a hub id that can't be had.
    """
    if choice.load_format == "dummy":
        return load_dummy(choice.name, choice.config, progress, pin=pin)
    folder = choice.source
    if folder is None:
        assert choice.hub_id is not None
        progress(f"downloading {choice.hub_id}")
        folder = hub.download(choice.hub_id, choice.cache or hub.cache_folder(os.environ))
    return load_folder(choice.name, folder, progress, pin=pin)


def slug(text: str) -> str:
    """Letters, digits, dots and dashes: safe in a file name, the same on every system."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _preset_name(hub_id: str) -> str | None:
    return next((name for name, preset in PRESETS.items() if preset.hub_id == hub_id), None)


def _folder_name(folder: Path) -> str:
    # A snapshot in the hub's cache: models--org--name/snapshots/<commit>
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--")
    return folder.name
