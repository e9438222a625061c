"""The options of ``python -m lowbit step``: its own module, so that the command line starts without torch."""

from __future__ import annotations

from typing import Any


def add_parser(commands: Any) -> None:
    """The sub-command. ``commands`` is what ``ArgumentParser.add_subparsers`` gave."""
    parser = commands.add_parser(
        "step", help="lowbit's own kernels alone: decode, prefill, time per kernel, equal bits"
    )
    parser.add_argument("--model", default="llama-3.1-8b", help="as in `pytest benches --model` (llama-3.1-8b)")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy", help="dummy weights, or real ones")
    parser.add_argument(
        "--formats", default="", metavar="LIST", help="weight formats by commas, such as int4_g128,ternary (all)"
    )
    parser.add_argument("--contexts", default="128,8192", metavar="LIST", help="tokens in the KV cache (128,8192)")
    parser.add_argument("--tokens", default="128,512", metavar="LIST", help="tokens decoded from there (128,512)")
    parser.add_argument("--prefill", default="512,2048", metavar="LIST", help="tokens of timed prompts; '' for none")
    parser.add_argument("--prefill-compiled", action="store_true", help="bf16's prompts compiled too: a minute more")
    parser.add_argument(
        "--kv", default="bf16", metavar="LIST", help="what the KV cache holds: bf16 (16 bits), fp8, int8"
    )
    parser.add_argument("--batch", default="1", metavar="LIST", help="sequences of a step, 1 to 8 each (1)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="runs that must agree in every bit (10)")
    parser.add_argument(
        "--logits", type=int, default=0, metavar="N", help="hold N positions against fp32: 32 GB more for 8B (0: none)"
    )
    parser.add_argument("--json", action="store_true", help="one object per line")
    parser.set_defaults(run=run)


def run(options: Any) -> int:
    """Measure and print."""
    from lowbit import native_step

    return native_step.main(options)
