"""The Hugging Face hub: its local cache, and downloads that bring safetensors, JSON and the tokenizer, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from lowbit import checkpoint
from lowbit.errors import LowbitError

CONFIG_FILES = ("config.json", "generation_config.json")
FILES = (
    *CONFIG_FILES,
    "*.safetensors",
    checkpoint.INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where the hub's files are kept, by its own rules: HF_HUB_CACHE, else HF_HOME/hub, else the default."""
    if value := env.get("HF_HUB_CACHE"):
        return Path(value).expanduser()
    if value := env.get("HF_HOME"):
        return Path(value).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def find_cached(hub_ids: Iterable[str], cache: Path) -> tuple[str, Path] | None:
    """The first of these models whose weights are all in the local cache: its id and folder. No network."""
    for hub_id in hub_ids:
        config = huggingface_hub.try_to_load_from_cache(hub_id, "config.json", cache_dir=cache)
        if isinstance(config, str) and _is_complete(Path(config).parent):
            return hub_id, Path(config).parent
    return None


def _is_complete(folder: Path) -> bool:
    try:
        return bool(checkpoint.weight_files(folder))
    except LowbitError:  # a download that was broken off: not found, and a preset is taken instead
        return False


def download(hub_id: str, cache: Path, *, config_only: bool = False) -> Path:
    """The local folder of a model, downloaded if need be. Raises LowbitError naming the three ways out."""
    patterns = CONFIG_FILES if config_only else FILES
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns), cache_dir=cache))
    except Exception as error:  # HTTP, proxy, TLS and disk errors of several libraries, which change with releases
        raise LowbitError(f"--model {hub_id}: {_reason(error)}. {_WAYS_OUT}") from error


def _reason(error: Exception) -> str:
    match error:
        case errors.GatedRepoError():
            return "the model is gated, and this machine's token (if any) has no access to it"
        case errors.RepositoryNotFoundError():
            return "no such model on the hub, or a private one"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return "the hub can't be reached (or HF_HUB_OFFLINE is set) and the model is not in the local cache"
        case ConnectionError() | TimeoutError():
            return f"the hub can't be reached ({error})"
    lines = str(error).strip().splitlines() or ["no text"]
    return f"the download failed ({type(error).__name__}: {lines[0]})"


_WAYS_OUT = (
    "Three ways out: (1) accept its licence on huggingface.co and log in with `hf auth login`; (2) point --model at a "
    "local folder with config.json and *.safetensors; (3) measure speed and memory without it, with a preset "
    "(llama-3.1-8b, llama-3.2-3b, llama-3.2-1b) and --load-format dummy"
)
