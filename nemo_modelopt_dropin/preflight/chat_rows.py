"""Read conversations in OpenAI's and ShareGPT's forms. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Columns that may contain a conversation; the first one present is used.
COLUMNS = ("messages", "conversations")
# ShareGPT's names of speakers; any other name is passed to the chat template as a role.
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "bard": "assistant", "observation": "tool"}
_FORMS = '[{"role": "user", "content": "..."}, ...] or [{"from": "human", "value": "..."}, ...]'


class ChatError(ValueError):
    """A conversation that cannot be used; the message names the turn."""


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        messages: Turns as chat templates expect them: ``role``, ``content`` and any other fields of the file.
    """

    messages: tuple[dict[str, Any], ...]


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of turns rather than a text or token ids."""
    return isinstance(value, Sequence) and bool(value) and not isinstance(value, str) and isinstance(value[0], Mapping)


def chat(turns: Sequence[Any], system: Any = None) -> Chat:
    """Return a conversation from a list of turns.

    Args:
        turns: Turns in OpenAI's form (``role``, ``content``) or ShareGPT's (``from``, ``value``).
        system: System prompt, which NeMo's chat files store in a separate field.

    Raises:
        ChatError: If a turn has neither form.
    """
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Chat(tuple(messages))


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ChatError(f"turn {number} of the conversation is a {type(turn).__name__}; expected {_FORMS}")
    # Parquet and `datasets` fill the missing fields of a turn with None.
    fields = {name: value for name, value in turn.items() if value is not None}
    if "from" in fields and "role" not in fields:
        speaker = str(fields.pop("from"))
        fields = {"role": _ROLES.get(speaker.lower(), speaker.lower()), "content": fields.pop("value", None), **fields}
    if not isinstance(fields.get("role"), str):
        raise ChatError(f"turn {number} of the conversation has the fields {sorted(map(str, turn))}; expected {_FORMS}")
    content = _text(fields.get("content"))
    if content is None and "tool_calls" not in fields:
        raise ChatError(f"turn {number} of the conversation has no text; expected {_FORMS}")
    return {**fields, "content": content or ""}


def _text(content: Any) -> str | None:
    """Return a turn's text, joined if it is a list of parts; None if there is content other than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def encode(conversation: Chat, tokenizer: Any) -> list[int]:
    """Return the token ids of a conversation, formatted by the tokenizer's chat template.

    Args:
        conversation: The conversation.
        tokenizer: NeMo's tokenizer.

    Raises:
        ChatError: If the tokenizer has no chat template, or the template rejects the conversation.
    """
    messages = [dict(message) for message in conversation.messages]
    inner = _inner(tokenizer)
    if inner is None:  # NeMo's SentencePiece tokenizer applies its own
        return list(tokenizer.text_to_ids(messages))
    return list(_format(inner, messages, tokenize=True, return_dict=False))


def encode_answers(conversation: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and for each whether it belongs to a reply of the assistant.

    Replies are what the chat template marks with ``{% generation %}``. For a template without marks, a reply is the
    text that it adds to the conversation so far, after the prompt that asks for a reply.

    Args:
        conversation: The conversation.
        tokenizer: NeMo's tokenizer, which wraps a fast one of Hugging Face with a chat template.

    Raises:
        ChatError: If the tokenizer or its template does not show where the replies are.
    """
    messages = [dict(message) for message in conversation.messages]
    inner = _inner(tokenizer)
    if inner is None or not getattr(inner, "is_fast", False):
        raise ChatError(
            "The assistant's replies cannot be found with this tokenizer. Use a fast tokenizer of Hugging Face with a "
            "chat template, or count all tokens."
        )
    if marks_replies(inner.chat_template):
        found = _format(inner, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
    text = _format(inner, messages, tokenize=False)
    spans = [_span(inner, messages, place, text) for place, one in enumerate(messages) if one["role"] == "assistant"]
    encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    replies = [any(first < end and start < last for start, end in spans) for first, last in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), replies


def marks_replies(template: Any) -> bool:
    """Return whether a chat template marks the assistant's replies, as ``transformers`` needs for a mask of them."""
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _span(inner: Any, messages: list[dict[str, Any]], place: int, text: str) -> tuple[int, int]:
    """Return where a reply begins and ends in the text of a conversation."""
    before = _format(inner, messages[:place], tokenize=False, add_generation_prompt=True) if place else ""
    after = _format(inner, messages[: place + 1], tokenize=False)
    if not (text.startswith(after) and after.startswith(before)):
        raise ChatError(
            f"The tokenizer's chat template changes earlier turns, so the reply in turn {place + 1} cannot be found. "
            "Use a template that marks replies with {% generation %} and {% endgeneration %} (--chat-template-path), "
            "or count all tokens."
        )
    return len(before), len(after)


def _inner(tokenizer: Any) -> Any:
    """Return the tokenizer of Hugging Face with a chat template, None if NeMo's own applies one."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and getattr(inner, "chat_template", None):
        return inner
    if not getattr(tokenizer, "chat_template", None):
        raise ChatError(
            f"The data holds conversations ({' or '.join(COLUMNS)}), but the tokenizer has no chat template. Use the "
            "tokenizer of an instruction-tuned model (--tokenizer), or data with a column text."
        )
    return None


def _format(inner: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Return what a chat template makes of a conversation."""
    try:
        return inner.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise errors of jinja2 for roles that they do not support
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ChatError(
            f"The tokenizer's chat template rejects a conversation with the roles {roles}: {error}"
        ) from error
