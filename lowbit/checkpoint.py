"""A Hugging Face folder on disk: its config, the index of its safetensors, and their bytes into given memory.

Safetensors only: a pickle can run code when it is opened. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lowbit.errors import LowbitError
from lowbit.formats import stored
from lowbit.hostmemory import Bytes, Spec
from lowbit.quiet import quiet_import

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The types of weights that can be quantized, by their safetensors names."""

STORED_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
"""Further ones of checkpoints that are quantized already."""

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Entry(NamedTuple):
    """Where one tensor's bytes lie: ``offset`` counts from the start of the file."""

    path: Path
    offset: int
    spec: Spec


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LowbitError naming the file when it can't be read or isn't one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LowbitError(f"can't read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise LowbitError(f"{path} is not valid JSON ({error}); it may be cut off: fetch it again") from error
    if not isinstance(content, dict):
        raise LowbitError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_config(folder: Path) -> Any:
    """The folder's LlamaConfig. Raises LowbitError for what isn't a Llama, plain or quantized in a way that is read."""
    if not folder.is_dir():
        raise LowbitError(
            f"--model {folder}: expected a folder with config.json and *.safetensors, got no folder there"
        )
    path = folder / "config.json"
    if not path.exists():
        raise LowbitError(
            f"{folder} has no config.json; --model takes a Hugging Face folder (config.json, *.safetensors)"
        )
    return make_config(read_json(path), str(path))


def make_config(values: Mapping[str, Any], where: str) -> Any:
    """A LlamaConfig from the contents of a config.json, of transformers 4 (``rope_scaling``) or 5."""
    if "auto_map" in values:
        raise LowbitError(
            f"{where} asks to run the checkpoint's own code (auto_map); lowbit never does. Remove auto_map"
        )
    if values.get("model_type") != "llama":
        raise LowbitError(f"{where}: expected model_type 'llama', got {values.get('model_type')!r}")
    stored.read(values, where)
    try:
        config = quiet_import("transformers").LlamaConfig.from_dict(dict(values))
        # A wrong rope type or missing rope field shows only here.
        _llama().LlamaRotaryEmbedding(config)
    except Exception as error:  # transformers' checks raise many unrelated types
        raise LowbitError(f"{where} is not a valid Llama config: {type(error).__name__}: {error}") from error
    return config


def _llama() -> Any:
    quiet_import("transformers")
    return quiet_import("transformers.models.llama.modeling_llama")


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of this Llama, as its state dict names them; a tied head is left out."""
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linears = {  # [out, in]
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        for name, shape in linears.items():
            shapes[f"{layer}{name}.weight"] = shape
            if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes[EMBEDDING] = (config.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not. Raises LowbitError when none or not all are there."""
    index = folder / INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise LowbitError(f"{index} has no weight_map; fetch it again")
        files = sorted(set(map(str, names.values())))
        if outside := [name for name in files if Path(name).name != name]:
            raise LowbitError(f"{index} names files outside its folder: {', '.join(outside)}")
        if missing := [name for name in files if not (folder / name).exists()]:
            raise LowbitError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing: {some(missing)}; fetch the folder again"
            )
        return [folder / name for name in files]
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise LowbitError(_no_weights(folder))
    return found


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} has its weights as pickles only ({some(pickles)}), which can run code when they are opened; "
            "lowbit reads safetensors: convert them with transformers' save_pretrained, or take another checkpoint"
        )
    return f"{folder} has a config.json and no weights (*.safetensors); add them, or use --load-format dummy"


def read_index(folder: Path, *, quantized: bool = False) -> dict[str, Entry]:
    """Every tensor of the folder, by its name in a LlamaForCausalLM. Reads headers only.

    ``quantized``: integers too, as in a checkpoint that is quantized already.
    """
    dtypes = DTYPES | STORED_DTYPES if quantized else DTYPES
    entries: dict[str, Entry] = {}
    for path in weight_files(folder):
        for name, entry in _read_header(path, dtypes).items():
            if name.endswith("rotary_emb.inv_freq"):  # saved by transformers before 4.31; made from the config since
                continue
            # A bare LlamaModel saves without the prefix.
            full = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
            if full in entries:
                raise LowbitError(f"{folder}: {name} is in both {entries[full].path.name} and {path.name}")
            entries[full] = entry
    return entries


def _read_header(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Entry]:
    """The tensors of one file. ``safe_open`` checks the header against the file's length: a cut file stops here."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        hint = "fetch it again"
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                hint = "it is only a Git LFS pointer: run git lfs pull"
        raise LowbitError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file ({error}); {hint}"
        ) from error
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        if fields["dtype"] not in dtypes:
            raise LowbitError(
                f"{path}: {name} is stored as {fields['dtype']}, expected one of {', '.join(dtypes)}; "
                "lowbit quantizes unquantized weights"
            )
        spec = Spec(tuple(fields["shape"]), dtypes[fields["dtype"]])
        entries[name] = Entry(path, 8 + length + fields["data_offsets"][0], spec)
    return entries


def match(entries: Mapping[str, Entry], config: Any, folder: Path, apart: Collection[str] = ()) -> dict[str, Entry]:
    """The entry of every parameter of the model but those ``apart``, which are stored in another way.

    Raises one LowbitError with all that is missing, extra or mis-shaped.

    A tied head may be stored under either of its two names, or under both (``same_bytes`` compares them).
    """
    entries = dict(entries)
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if name not in apart}
    if config.tie_word_embeddings:
        head = entries.pop(HEAD, None)
        if head is not None:
            entries.setdefault(EMBEDDING, head)
    missing = [name for name in shapes if name not in entries]
    extra = [name for name in entries if name not in shapes]
    wrong = [
        f"{name} (expected {list(shapes[name])}, got {list(entry.spec.shape)})"
        for name, entry in entries.items()
        if name in shapes and entry.spec.shape != shapes[name]
    ]
    problems = {"missing": missing, "unexpected": extra, "of another shape": wrong}
    if any(problems.values()):
        texts = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LowbitError(f"the tensors in {folder} don't fit its config.json; {'; '.join(texts)}")
    return {name: entries[name] for name in shapes}


def read_bytes(entry: Entry, out: Bytes, start: int = 0) -> None:
    """Read the tensor's bytes start .. start + len(out) into ``out``. Runs beside other threads."""
    view, done = out.data, 0
    with entry.path.open("rb", buffering=0) as file:
        while done < len(out):
            count = os.preadv(file.fileno(), [view[done:]], entry.offset + start + done)
            if count == 0:
                raise LowbitError(f"{entry.path} became shorter while it was read; fetch it again")
            done += count


def some(names: list[str], limit: int = 4) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
