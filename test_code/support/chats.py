"""Conversations, and chat templates with and without marks of the assistant's replies."""

from __future__ import annotations

import json
from pathlib import Path

from test_code.support import tiny

PLAIN = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '.' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant.' }}{% endif %}"
)
# transformers makes its mask of the parts between the marks.
MARKED = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '.' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% else %}{{ message['content'] + '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant.' }}{% endif %}"
)
# Leaves all replies but the last out, as templates of reasoning models do with thoughts.
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "{{ '<s>' + message['role'] + '.' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)


def tokenizer(template: str | None = MARKED):
    """Return NeMo's tokenizer with a chat template."""
    found = tiny.tokenizer()
    found.tokenizer.chat_template = template
    return found


def rows(count: int) -> list[dict]:
    """Return conversations of unequal length, every third with two replies."""
    texts = tiny.texts(4 * count)
    found = []
    for i in range(count):
        user, reply, more, last = (text[: 12 + 7 * (i % 5)] for text in texts[4 * i : 4 * i + 4])
        turns = [("user", user), ("assistant", reply)]
        turns += [("user", more), ("assistant", last)] if i % 3 == 0 else []
        found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return found


def write(path: Path, count: int) -> Path:
    """Write conversations as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path
