"""A tokenizer whose ids are characters, so that a test can count tokens by eye."""

from __future__ import annotations

from collections.abc import Sequence

END = 0  # the only special id


class CharTokenizer:
    chat_template = None
    eos_token_id = END

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        special = "" if skip_special_tokens else "<end>"
        return "".join(special if i == END else chr(i) for i in token_ids)

    def apply_chat_template(self, conversation, **options) -> str:
        raise AssertionError("this tokenizer has no chat template")
