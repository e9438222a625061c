"""Text from a stream of tokens, piece by piece."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character whose last ones are still to come."""


class Detokenizer:
    """Turns tokens into the pieces of text that each adds; put together they are the text of all.

    A token alone can't be decoded: a character may be spread over several, and some tokenizers put a space only
    between two. So the tokens since the last whole piece are decoded together with that piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the piece before
        self._shown = 0  # tokens whose text has been given

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete, and for special tokens."""
        self._ids.append(token)
        text = self._new_text()
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def finish(self) -> str:
        """What is left: an incomplete character, as the tokenizer writes it."""
        return self._show(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _show(self, text: str) -> str:
        if text:
            self._start, self._shown = self._shown, len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
