"""Rows as people store them -> the columns that TRL's trainers read, each row checked."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import date
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List, Value, interleave_datasets
from jinja2 import Environment, StrictUndefined, TemplateError
from jinja2.meta import find_undeclared_variables
from trl import extract_prompt

from hft.config import TURNS
from hft.errors import HFTError, reason

ALPACA = "{{ instruction }}{% if input is defined and input %}\n\n{{ input }}{% endif %}", "{{ output }}"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # which TRL gives to the chat template
Converted = tuple[dict[str, list[dict[str, Any]]], str]  # a row, and why it is to be dropped, or ""

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
SHAREGPT_ROLES = {"human": "user", "observation": "tool"}
SHAREGPT_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# What an assistant can say besides its content.
OTHER_SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def sft_rows(dataset: Dataset, name: str) -> tuple[Dataset, list[str]]:
    """Demonstrations that have something to learn, with their number as column `row`, and notes on the others."""
    columns = set(dataset.column_names)
    if "conversations" in columns and "messages" not in columns:
        return sft_rows(dataset.rename_column("conversations", "messages"), name)
    if "messages" in columns:
        return _convert(dataset, name, _conversation, ["messages"], "rows")
    if {"prompt", "completion"} <= columns:
        is_text = {type(dataset.features[column]) for column in ("prompt", "completion")} == {Value}
        return _convert(dataset, name, _text if is_text else _completion, ["prompt", "completion"], "rows")
    if {"instruction", "output"} <= columns:
        return sft_rows(rendered(dataset, *ALPACA), name)
    if "text" in columns:
        return _convert(dataset, name, _text, ["text"], "rows")
    hint = "; it looks like preferences, which are for DPO" if {"chosen", "rejected"} <= columns else ""
    raise HFTError(
        f"dataset {name} has columns {', '.join(sorted(columns))}; needed are messages, or prompt and completion, as "
        f"columns or as keys with templates over the columns, such as --prompt '{{{{ question }}}}'{hint}"
    )


def preference_rows(dataset: Dataset, name: str) -> tuple[Dataset, list[str]]:
    """The same for preferences: conversations with an explicit prompt, the one form that TRL always reads alike."""
    columns = set(dataset.column_names)
    if {"chosen", "rejected"} <= columns:
        return _convert(dataset, name, _preference, ["prompt", "chosen", "rejected"], "pairs")
    hint = "; it looks like demonstrations, which are for SFT" if {"messages", "completion"} & columns else ""
    forms = "chosen and rejected as messages with the prompt in front or in another column"
    needed = f"needed are {forms}, or prompt, chosen and rejected as text{hint}"
    raise HFTError(f"dataset {name} has columns {', '.join(sorted(columns))}; {needed}")


def unpaired_rows(dataset: Dataset, name: str) -> tuple[Dataset, list[str]]:
    """Preferences with each answer as a row, `label` saying whether it was chosen.

    They alternate, so that a batch holds both. The rejected ones are two pairs ahead, since KTO's KL term gives each
    prompt the answer of the row before, which should be to another prompt.
    """
    pairs, notes = preference_rows(dataset, name)
    ahead = pairs.select([(index + 2) % len(pairs) for index in range(len(pairs))])

    def answers(rows: Dataset, kept: str, other: str) -> Dataset:
        labels = [kept == "chosen"] * len(rows)
        return rows.remove_columns(other).rename_column(kept, "completion").add_column("label", labels)

    return interleave_datasets([answers(pairs, "chosen", "rejected"), answers(ahead, "rejected", "chosen")]), notes


def rendered(dataset: Dataset, prompt: str | None, completion: str | None) -> Dataset:
    """Rows as a turn of the user and one of the assistant, by jinja2 templates over their columns, if there are any."""
    if prompt is None or completion is None:
        return dataset
    columns = dataset.column_names
    environment = Environment(undefined=StrictUndefined, autoescape=False, finalize=_as_stored)
    misfit = f"prompt and completion do not fit the columns {', '.join(columns)}"
    try:
        user, assistant = environment.from_string(prompt), environment.from_string(completion)
        named = find_undeclared_variables(environment.parse(prompt + completion))
    except TemplateError as error:
        raise HFTError(f"{misfit}: {reason(error)}") from error
    if not named or {prompt, completion} & {*columns}:
        raise HFTError(f"{misfit}: a column is written in braces, such as '{{{{ {columns[0]} }}}}'")

    def render(row: dict[str, Any], number: int) -> dict[str, list[dict[str, str]]]:
        try:
            question = {"role": "user", "content": user.render(row)}
            return {"prompt": [question], "completion": [{"role": "assistant", "content": assistant.render(row)}]}
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise HFTError(f"row {number} (the first is 0): {misfit}: {reason(error)}") from None

    used = [column for column in columns if column in named | {"messages", "conversations"}]
    return dataset.map(render, with_indices=True, remove_columns=used, desc="rendering rows")


def _as_stored(value: object) -> object:
    if value is None:
        raise TemplateError("a column is null")
    if isinstance(value, date):  # and a time
        raise TemplateError("a column of dates, whose own text is lost; save the rows as .csv")
    return value


def are_text(dataset: Dataset) -> bool:
    """Whether the rows are text, to which TRL applies no chat template, instead of conversations."""
    return any(isinstance(dataset.features.get(column), Value) for column in ("prompt", "text"))


def _text(row: dict[str, Any]) -> Converted:
    for column, text in row.items():
        if not isinstance(text, str):
            raise HFTError(f"{column} must be text, got {'null' if text is None else repr(text)}")
    return row, "" if row.get("completion", row.get("text")).strip() else "with a blank answer"


def _conversation(row: dict[str, Any]) -> Converted:
    messages = chat(row["messages"], "messages")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise HFTError("messages has no assistant turn")
    return {"messages": messages}, "with a blank answer" if any(map(is_blank, answers)) else ""


def _completion(row: dict[str, Any]) -> Converted:
    completion = chat(row["completion"], "completion", "assistant")
    for index, role in enumerate(message["role"] for message in completion):
        if role != "assistant":
            what = f"completion[{index}] is a turn of the {role}, which would be trained"
            raise HFTError(f"{what}; give the conversation as messages, with assistant_only_loss")
    fault = "with a blank answer" if any(map(is_blank, completion)) else ""
    return {"prompt": chat(row["prompt"], "prompt", "user"), "completion": completion}, fault


def _preference(row: dict[str, Any]) -> Converted:
    pair = {column: chat(row[column], column, "assistant") for column in ("chosen", "rejected")}
    for column, messages in pair.items():
        if messages[-1]["role"] != "assistant":
            raise HFTError(f"{column} must end with a turn of the assistant, not of the {messages[-1]['role']}")
    answers = [messages[-1] for messages in pair.values()]
    if pair["chosen"][0]["role"] != "assistant":
        pair = extract_prompt(pair)
        if not pair["prompt"]:
            raise HFTError("chosen and rejected have no prompt in common")
    elif row.get("prompt") is None:
        raise HFTError("chosen needs a prompt, in front of it as messages or in another column")
    else:
        pair["prompt"] = chat(row["prompt"], "prompt", "user")
    fault = ""
    if any(map(is_blank, answers)):
        fault = "with an empty answer"
    elif pair["chosen"] == pair["rejected"]:
        fault = "with equal answers"
    elif any(message["role"] != "assistant" for message in pair["chosen"] + pair["rejected"]):
        fault = "that differ before the last answer"
    return pair, fault


def _convert(
    dataset: Dataset, name: str, convert: Callable[[dict[str, Any]], Converted], outputs: list[str], unit: str
) -> tuple[Dataset, list[str]]:
    """Convert and check each row, and drop those with nothing to learn; the first of `outputs` gets `system`."""
    columns, are_text = dataset.column_names, convert is _text
    if images := sorted({"image", "images"} & set(columns)):
        raise HFTError(f"dataset {name} has a column {images[0]}, and only text is trained on; remove it")
    kept = [] if are_text else [column for column in TEMPLATE_COLUMNS if column in columns]
    used = [column for column in (*outputs, *kept, *([] if are_text else ["system"])) if column in columns]
    features = dict.fromkeys(outputs, Value("string") if are_text else List(Json())) | dict.fromkeys(kept, Json())
    features |= {"row": Value("int64"), "fault": Value("string"), "has_system": Value("bool")}
    stored = dataset.features

    def checked_row(stored_row: dict[str, Any], number: int) -> dict[str, Any]:
        given = {column: _without_padding(stored_row[column], stored[column]) for column in used}
        try:
            row, fault = convert(given)
            row[outputs[0]], had_one = _with_system(row[outputs[0]], given.get("system"))
            extras = {column: _from_json(given[column], column) for column in kept}
        except HFTError as error:
            raise HFTError(f"dataset {name}, row {number} (the first is 0): {error}") from None
        if not are_text:  # as JSON text, since `Json` would write numbers in messages with ten decimals
            row = {column: [json.dumps(message) for message in messages] for column, messages in row.items()}
        row |= {column: None if value is None else json.dumps(value) for column, value in extras.items()}
        return row | {"row": number, "fault": fault, "has_system": had_one}

    converted = dataset.select_columns(used).map(
        checked_row, with_indices=True, features=Features(features), remove_columns=used, desc=f"checking {unit}"
    )
    notes = []
    if unused := [column for column in columns if column not in used]:
        notes.append(f"columns not used: {', '.join(unused)}")
    if are_text and "prompt" in outputs:
        keys = " ".join(f"--{key} '{template}'" for key, template in TURNS.items())
        notes.append(f"prompt and completion are text, joined without a chat template; {keys} makes them turns")
    elif are_text:
        notes.append("text trains whole, without a chat template")
    elif "chosen" in outputs and Value in (type(stored["chosen"]), type(stored["rejected"])):
        notes.append("chosen and rejected are text, which becomes turns of the chat template")
    if count := sum(converted["has_system"][:]):
        notes.append(f"system not used in {count:,} rows that begin with another system message")
    faults = converted["fault"][:]
    good = [index for index, fault in enumerate(faults) if not fault]
    if counts := ", ".join(f"{count:,} {fault}" for fault, count in Counter(filter(None, faults)).items()):
        notes.append(f"dataset {name}: dropped {counts}, of {len(faults):,} {unit}")
    if not good:
        raise HFTError(f"dataset {name} has no {unit[:-1]} to learn from: {counts}")
    return converted.remove_columns(["fault", "has_system"]).select(good), notes


def _with_system(messages: list[dict], system: object) -> tuple[list[dict], bool]:
    """A conversation that begins with a system message, and whether it had another one already, which wins."""
    if not (system.strip() if isinstance(system, str) else system):
        return messages, False
    [first] = chat(system, "system", "system")
    if messages[0]["role"] in ("system", "developer"):
        return messages, messages[0]["content"] != first["content"]
    return [first, *messages], False


def _from_json(value: object, column: str) -> object:
    """`tools` or `chat_template_kwargs`, which may be stored as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise HFTError(f"{column} is not JSON: {error}") from None
    if column == "chat_template_kwargs":
        if not isinstance(value, dict | None):
            raise HFTError(f"{column} must map names to values, got {value!r:.80}")
        return value or {}
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise HFTError(f"{column} must be a list of function schemas, got {value!r:.80}")
    return value


def _without_padding(value: object, feature: object) -> object:
    """A value without the keys that Arrow added: a struct has the keys of all rows, null where a row has none."""
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _without_padding(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [_without_padding(item, feature.feature) for item in value]
    return value


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
    content = _text_of(content, where)
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise HFTError(f"{where}: tool_calls must be a list of calls, got {calls!r:.80}")
    if content is None and not any(message.get(key) for key in OTHER_SPEECH):
        raise HFTError(f"{where} has null for content")
    return message | {"role": role, "content": content}


def _text_of(content: object, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise HFTError(f"{where}: content must be text, got {content!r:.80}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise HFTError(f"{where}: content has a part {kind!r:.40}; only parts of type text can be trained on")
    return "".join(part["text"] for part in content)
