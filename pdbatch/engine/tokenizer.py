"""Text to token ids and back, by the model's own tokenizer and chat template.

A model without tokenizer files still serves requests of token ids; its outputs have no text.
Nothing here touches a device. A `Tokenizer` may be used by several threads at once; a
`Detokenizer` belongs to one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdbatch.errors import ModelError
from pdbatch.request import RequestSpec

_CONTEXT_TOKENS = 5
"""Prompt tokens that a detokenizer looks back at: enough for any leading space to be right."""
_MOST_CONTEXT_TOKENS = 16
"""How far it looks back for the beginning of a character."""
_HELD_TOKENS = 12
"""Tokens after which an incomplete character is taken for what it is: broken bytes."""


class PromptError(ValueError):
    """A prompt cannot be turned into token ids; `param` is the field that is wrong."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class Detokenizer:
    """Text of one output, as its tokens come.

    `push` gives back only what later tokens cannot change: bytes of a character that is not
    complete are held until it is.
    """

    def __init__(self, backend: Any, prompt_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._begin = 0
        for context in range(_CONTEXT_TOKENS, _MOST_CONTEXT_TOKENS):
            self._ids = list(prompt_token_ids[-context:])
            self._end = len(self._ids)
            self._shown = self._decode(0, self._end)
            if "\ufffd" not in self._shown or context >= len(prompt_token_ids):
                break  # else the context begins within a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; the text that is now settled (often one token's, may be "")."""
        pieces = []
        for token_id in token_ids:
            self._ids.append(token_id)
            pieces.append(self._advance(final=len(self._ids) - self._end > _HELD_TOKENS))
        return "".join(pieces)

    def flush(self) -> str:
        """What is still held at the end of the output, broken characters as U+FFFD."""
        return self._advance(final=True) if self._end < len(self._ids) else ""

    def _advance(self, *, final: bool) -> str:
        text = self._decode(self._begin, len(self._ids))
        if text.endswith("\ufffd") and not final:
            return ""
        piece = text[len(self._shown) :]
        self._begin, self._end = self._end, len(self._ids)
        self._shown = self._decode(self._begin, self._end)
        return piece

    def _decode(self, begin: int, end: int) -> str:
        if self._backend is None or begin == end:
            return ""
        text: str = self._backend.decode(self._ids[begin:end], skip_special_tokens=True)
        return text


class Tokenizer:
    """A model's tokenizer; `backend` is transformers', or None where the model has none.

    `vocab_size` is the number of rows of the model's embedding: ids below it may be run.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    """The tokenizer's own end token; `LoadedModel.eos_token_ids` has the model's beside it."""

    def __init__(self, backend: Any, vocab_size: int) -> None:
        self._hf = backend
        self._fast = getattr(backend, "backend_tokenizer", None) or backend
        self.vocab_size = vocab_size
        eos = getattr(backend, "eos_token_id", None)
        self.eos_token_ids = () if eos is None else (int(eos),)
        self._texts: dict[int, str] = {}

    @staticmethod
    def load(folder: Path, vocab_size: int) -> Tokenizer:
        """From a model's folder. Raises ModelError if its files are there but broken."""
        from transformers import AutoTokenizer

        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any((folder / name).exists() for name in names):
            return Tokenizer(None, vocab_size)
        try:
            backend = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
        return Tokenizer(backend, vocab_size)

    def encode(self, spec: RequestSpec) -> list[int]:
        """Token ids of a request's prompt, never empty.

        A prompt gets the model's own special tokens; messages (and tools) go through the
        chat template, with the beginning of the assistant's turn at the end.
        Raises PromptError.
        """
        if spec.prompt_token_ids is not None:
            return self._checked(spec.prompt_token_ids)
        if spec.messages is not None:
            param, text = "messages", self._render(spec)
        else:
            param, text = "prompt", spec.prompt or ""
        if self._hf is None:
            raise PromptError("the model has no tokenizer; send prompt_token_ids", param=param)
        try:
            ids = self._hf.encode(text, add_special_tokens=param == "prompt")
        except Exception as error:
            raise PromptError(f"{param} is no valid text: {error}", param=param) from error
        if not ids:
            raise PromptError(f"{param} is empty; it needs at least one token", param=param)
        return self._checked(ids)

    def token_text(self, token_id: int) -> str:
        """One token as it stands in text, special tokens and leading space included."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._token_text(token_id)
        return text

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """For the text of one output that follows this prompt."""
        return Detokenizer(self._fast, prompt_token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        if self._hf is None:
            return ""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        ids = list(token_ids)
        if not ids:
            raise PromptError("prompt_token_ids is empty", param="prompt_token_ids")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = min(ids) if min(ids) < 0 else max(ids)
            message = f"token id {bad} is outside the model's vocabulary of {self.vocab_size}"
            raise PromptError(message, param="prompt_token_ids")
        return ids

    def _render(self, spec: RequestSpec) -> str:
        messages = [_flattened(message, at) for at, message in enumerate(spec.messages or ())]
        if not messages:
            raise PromptError("messages is empty", param="messages")
        if not getattr(self._hf, "chat_template", None):
            message = "the model has no chat template; send a prompt to /v1/completions"
            raise PromptError(message, param="messages")
        try:
            text: str = self._hf.apply_chat_template(
                messages, tools=spec.tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is the model's program: any error may come out
            message = f"the model's chat template refused messages: {error}"
            raise PromptError(message, param="messages") from error
        return text

    def _token_text(self, token_id: int) -> str:
        if self._hf is None:
            return ""
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        piece = self._hf.convert_ids_to_tokens(token_id) if token_id < len(self._hf) else None
        leading = isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ")
        return " " + text if leading else text


def _flattened(message: dict[str, Any], at: int) -> dict[str, Any]:
    """A message whose content of text parts became one string, as templates expect it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            where = f"messages[{at}].content[{number}]"
            raise PromptError(f"{where} is no text part; the model reads text only", param=where)
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
