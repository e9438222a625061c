"""Quality of one format: scored against reference logits that a session makes once, streamed where bf16 doesn't fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lowbit import backends, measure, process_state, quality, quantized, streamed, texts, truth
from lowbit.cases import Case
from lowbit.device import MIB, Device
from lowbit.formats import FORMATS, Format
from lowbit.hostmodel import HostModel
from lowbit.kernels.weights import PIECE
from lowbit.metrics import Measurement, Quality
from lowbit.quantized import TORCH_DTYPES, Quantized
from lowbit.record import Record

Progress = Callable[[str], None]

KV_CONTEXTS = (2048, 8192)
"""Windows that a packed KV cache is scored at beside the text's own, where the model's context and the text allow."""


@dataclass
class Scorer:
    """The text and the reference of a session. ``host`` is the model whose quality is scored."""

    device: Device
    source: texts.Source
    vram: measure.VramMeter
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._text: quality.Text | None = None
        self._references: dict[int, quality.Reference] = {}

    def is_ready(self, host: HostModel, fmt: Format) -> bool:
        """Whether every reference that this format is scored against has been made."""
        return all(text.window in self._references for text in self.texts(host, fmt))

    def prepare(self, host: HostModel, fmt: Format) -> None:
        """Make the references that are missing, on a device free of other models."""
        for text in self.texts(host, fmt):
            self.reference(host, text)

    def close(self) -> None:
        """Free the reference logits and their files."""
        for reference in self._references.values():
            reference.close()
        self._references = {}

    def text(self, host: HostModel) -> quality.Text:
        if self._text is None:
            self._text = self.source.load(host.tokenizer)
        return self._text

    def texts(self, host: HostModel, fmt: Format) -> list[quality.Text]:
        """The text as a format is scored on it: in its own windows, and in longer ones where the KV cache is packed."""
        text = self.text(host)
        limit = min(host.config.max_position_embeddings, len(text.ids))
        asked = [window for window in KV_CONTEXTS if text.window < window] if fmt.kv else []
        if missing := [str(window) for window in asked if window > limit]:
            positions = host.config.max_position_embeddings
            note = (
                f"no KV cache is scored at contexts of {', '.join(missing)} tokens: {host.name} has {positions} "
                f"positions, its text {len(text.ids)} tokens"
            )
            self.notes += [note] if note not in self.notes else []
        return [text, *(replace(text, window=window) for window in asked if window <= limit)]

    def reference(self, host: HostModel, text: quality.Text | None = None) -> quality.Reference:
        """Logits of this run's own bf16 (fp16 where the device has no bf16), made on a device free of other models.

        Of a longer window fewer are kept: as many positions in all.
        """
        own = self.text(host)
        text = own if text is None else text
        if text.window not in self._references:
            base = base_format(self.device)
            kept = max(1, quality.REFERENCE_WINDOWS * own.window // text.window)
            self.progress(f"{base.id}: reference logits of {text.protocol}")
            with measure.cpu_threads(self.device):
                model = self._base_model(host, base, text)
                self._references[text.window] = quality.Reference.build(model, text, windows=kept, source=base.id)
            del model
            self.vram.release()
        return self._references[text.window]

    def _base_model(self, host: HostModel, base: Format, text: quality.Text) -> Any:
        unmet = measure.memory_fits(self.device, reference_mib(base, host.config, text.window))
        if unmet is None:
            return quantized.build(host, base, self.device).model
        self.notes.append(f"{base.id} does not fit ({unmet.reason}): reference logits streamed layer by layer")
        dtype = TORCH_DTYPES[self.device.dtype_for(base) or "fp16"]
        return streamed.stream(host, self.device.torch, dtype, text.windows(), self.progress)

    def measure(
        self, made: Quantized, host: HostModel, case: Case, record: Record, rounds: Callable[..., Any], *, own: bool
    ) -> Measurement:
        """Everything about a format's quality. ``own``: ``made`` is the run's model, not the embedded one beside it."""
        record.dtype = made.dtype
        record.info["coverage"] = made.coverage.to_dict()
        record.info["quality_model"] = host.name
        kernel_error = self.prove(made, host, record)
        scored, *further = self.score(made, host, case.name, rounds)
        unsaved = sum(buffer.numel() * buffer.element_size() for buffer in made.model.model.rotary_emb.buffers())
        return Measurement(
            kind="quality",
            quality=scored,
            further_quality=further,
            kernel_error=kernel_error,
            bits_per_weight=made.coverage.bits_per_weight if own else None,
            weights_bytes=made.coverage.resident_bytes if own else None,
            # No checkpoint holds RoPE's inverse frequencies: they follow from the config
            checkpoint_bytes=made.coverage.resident_bytes - unsaved if own else None,
            load_s=host.load_s,
            quantize_s=made.quantize_s,
        )

    def prove(self, made: Quantized, host: HostModel, record: Record) -> float | None:
        """The largest kernel error of the model's linears, or None with the reason in the record's ``unavailable``.

        What each linear showed goes into the record's info. Raises TruthError beyond the dtype's bound.
        """
        self.progress(f"{made.format.id}: kernels against the product with their own weights")
        try:
            with process_state.preserved_state(), measure.cpu_threads(self.device):
                found = truth.prove(made.model, made.format, TORCH_DTYPES[made.dtype], host.master)
        except backends.NoTruth as reason:
            record.unavailable["kernel_rel_error"] = str(reason)
            return None
        record.info["truth"] = {path: asdict(one) for path, one in found.items()}
        return max(one.kernel for one in found.values())

    def score(self, made: Quantized, host: HostModel, name: str, rounds: Callable[..., Any]) -> list[Quality]:
        """Perplexity, KL and top-1 of a model on each of its texts. ``rounds`` runs it once.

        Raises LowbitError naming ``name`` on NaN.
        """
        asked = [(text, self.reference(host, text)) for text in self.texts(host, made.format)]
        self.progress(f"{made.format.id}: perplexity and KL on {', '.join(text.protocol for text, _ in asked)}")
        scored: list[Quality] = []

        def target() -> None:
            with process_state.preserved_state(), measure.cpu_threads(self.device):
                for text, reference in asked:
                    scored.append(quality.score(made.model, text, reference, source=name, kv=made.format.kv))

        rounds(target, rounds=1)
        return scored


def base_format(device: Device) -> Format:
    """What quality is taken against: bf16, or fp16 where the device has no bf16."""
    bf16 = FORMATS["bf16-torch"]
    return bf16 if device.dtype_for(bf16) else FORMATS["fp16-torch"]


def reference_mib(base: Format, config: Any, window: int) -> float:
    """About what the base model takes while it is scored: its weights, one window's activations, blocks of logits."""
    return backends.estimate_mib(base, config) + (_activations(config, window) + 4 * quality.CHUNK_BYTES) / MIB


def scoring_mib(fmt: Format, config: Any, window: int) -> float:
    """About what scoring takes beside a format's weights, windows of ``window`` tokens and what KV_CONTEXTS adds.

    The larger of a layer's activations, with the cache of a format that has its own, and the blocks of logits, with
    the piece of a quantized head that is dequantized for them.
    """
    longest = max([window, *(each for each in KV_CONTEXTS if fmt.kv and each <= config.max_position_embeddings)])
    cache = quantized.kv_bytes_per_token(fmt, config) * longest if fmt.kv else 0.0
    head = 2 * min(PIECE, config.vocab_size * config.hidden_size) if "lm_head" in fmt.targets else 0
    logits = quality.scored_bytes(config.vocab_size, longest) + head
    return (cache + max(_activations(config, longest), logits)) / MIB


def _activations(config: Any, window: int) -> int:
    """Bytes of one layer's, in 16 bits."""
    return 2 * window * int(4 * config.hidden_size + 3 * config.intermediate_size)
