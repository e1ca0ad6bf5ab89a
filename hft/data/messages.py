"""One conversation in any common spelling -> a list of `{role, content, ...}` with text content, or an error."""

from typing import Any

from hft.errors import HFTError

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
SHAREGPT_ROLES = {"human": "user", "observation": "tool"}
SHAREGPT_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# What an assistant can say besides its content.
OTHER_SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def chat(value: object, column: str, role: str | None = None) -> list[dict[str, Any]]:
    """A conversation as a list of messages, with other keys kept; `role` is who says a value that is plain text."""
    if isinstance(value, str) and role:
        value = [{"role": role, "content": value}]
    if value is None:
        raise HFTError(f"{column} is null")
    if not isinstance(value, list):
        raise HFTError(f"{column} must be {'text or ' if role else ''}a list of {{role, content}}, got {value!r:.80}")
    if not value:
        raise HFTError(f"{column} is empty")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def is_blank(message: dict[str, Any]) -> bool:
    """Whether a message says nothing: no text, no tool call, no reasoning."""
    return not (message["content"] or "").strip() and not any(message.get(key) for key in OTHER_SPEECH)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise HFTError(f"{where} must be {{role, content}}, got {message!r:.80}")
    message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    role = SHAREGPT_ROLES.get(str(role), role)
    if role not in CHAT_ROLES:
        raise HFTError(f"{where} has the unknown role {role!r}; known are {', '.join(CHAT_ROLES)}")
    content = _text(content, where)
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise HFTError(f"{where}: tool_calls must be a list of calls, got {calls!r:.80}")
    if content is None and not any(message.get(key) for key in OTHER_SPEECH):
        raise HFTError(f"{where} has null for content")
    return message | {"role": role, "content": content}


def _text(content: object, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise HFTError(f"{where}: content must be text, got {content!r:.80}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise HFTError(f"{where}: content has a part {kind!r:.40}; only parts of type text can be trained on")
    return "".join(part["text"] for part in content)
