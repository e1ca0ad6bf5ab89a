"""Rows as people store them: nothing given is dropped silently, and an odd row is named by its number."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import hft
from hft.data import load_data, load_split, preference_rows, sft_rows
from hft.data.rows import rendered
from hft.errors import HFTError
from hft.runs.train import make_trainer
from tests.conftest import error_of, write_jsonl

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "get_tide", "description": "tide at a harbor", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"harbor": "X"}}}
TEMPLATE = """
{%- if tools %}{{- '<|system|>\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '\n' }}{%- endif %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}{{- '<|assistant|>\n' }}{% generation %}{{- m['content'] or '' }}
{%- for call in m['tool_calls'] or [] %}{{- '<call>' + call['function']['name'] + '</call>' }}{%- endfor %}
{{- eos_token }}{% endgeneration %}
{%- else %}{{- '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{%- endif %}
{%- endfor %}"""


def rows_of(*rows: dict) -> Dataset:
    return Dataset.from_list(list(rows), on_mixed_types="use_json")


@pytest.fixture
def template(tmp_path):
    (tmp_path / "tools.jinja").write_text(TEMPLATE)
    return str(tmp_path / "tools.jinja")


def trainer_of(tiny, rows, tmp_path, **settings):
    """The trainer of a run on some rows, ready to train."""
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings |= {"model_name_or_path": str(tiny), "dataset_name": str(file), "output_dir": str(tmp_path / "out")}
    settings |= {"report_to": "none", "eval_strategy": "no", "eval_on_start": False, "max_steps": 1}
    return make_trainer(hft.make_plan(hft.load_config("sft", "recipes/tiny/sft.yaml", **settings)))


def test_tools_reach_the_template_as_under_trl(tiny, tmp_path, template):
    rows = [{"messages": [USER, ASSISTANT], "tools": [TOOL]}, {"messages": [USER, ASSISTANT], "tools": None}] * 8
    trainer = trainer_of(tiny, rows, tmp_path, chat_template_path=template)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    args = SFTConfig(str(tmp_path / "trl"), assistant_only_loss=True, max_length=256, use_cpu=True, bf16=False)
    file = Dataset.from_json(str(tmp_path / "rows.jsonl"))
    plain = SFTTrainer(str(tiny), args, train_dataset=file, processing_class=tokenizer)
    ours, theirs = (trainer.train_dataset["input_ids"][:], plain.train_dataset["input_ids"][:])
    assert ours == theirs
    assert len(ours[0]) > len(ours[1])


def test_a_call_without_text_is_something_to_learn(tiny, tmp_path, template):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    trainer = trainer_of(
        tiny, [{"messages": [USER, call], "tools": [TOOL]}] * 16, tmp_path, chat_template_path=template
    )
    row = trainer.train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert trainer.processing_class.decode(trained) == "<call>get_tide</call></s>"


def test_a_template_that_adds_text_to_text_takes_a_call_without_text(tiny, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    strict = TEMPLATE.replace("m['content'] or ''", "'' if m['tool_calls'] else '' + m['content']")
    (tmp_path / "strict.jinja").write_text(strict)
    trainer = trainer_of(
        tiny, [{"messages": [USER, call]}] * 16, tmp_path, chat_template_path=f"{tmp_path}/strict.jinja"
    )
    assert len(trainer.train_dataset) == 16


def test_a_template_that_does_not_write_calls_is_refused(tiny, tmp_path):
    call = {"role": "assistant", "content": "see", "tool_calls": [CALL]}
    with pytest.raises(HFTError, match=r"row 0 .*: the chat template does not write tool calls"):
        trainer_of(tiny, [{"messages": [USER, call]}] * 16, tmp_path)


def test_a_system_column_is_used_and_other_columns_are_named():
    own = {"role": "system", "content": "mine"}
    rows = [{"messages": [USER, ASSISTANT], "system": "be brief", "source": "x"}]
    rows += [{"messages": [own, USER, ASSISTANT], "system": "be brief", "source": "y"}]
    dataset, notes = sft_rows(rows_of(*rows), "x")
    assert [row["messages"][0]["content"] for row in dataset] == ["be brief", "mine"]
    assert notes == [
        "columns not used: source",
        "system not used in 1 rows that begin with another system message",
    ]


@pytest.mark.parametrize(
    ("row", "settings", "trained"),
    [
        ({"prompt": "q is", "completion": " a"}, {}, ("q is a</s>", " a</s>")),
        ({"text": "q is a"}, {}, ("q is a</s>", "q is a</s>")),
        (
            {"prompt": "q", "completion": "a"},
            {"prompt": "{{ prompt }}", "completion": "{{ completion }}"},
            ("<s><|user|>\nq\n<|assistant|>\na</s>", "a</s>"),
        ),
        (
            {"question": "q", "answer": "a"},
            {"prompt": "Say: {{ question }}", "completion": "{{ answer }}"},
            ("<s><|user|>\nSay: q\n<|assistant|>\na</s>", "a</s>"),
        ),
    ],
)
def test_text_is_read_as_trl_reads_it_and_templates_make_turns(tiny, tmp_path, row, settings, trained):
    """The recipe's assistant_only_loss is about conversations."""
    trainer = trainer_of(tiny, [row] * 16, tmp_path, **settings)
    tokens, labels = trainer.train_dataset["input_ids"][0], trainer.train_dataset["labels"][0]
    decode = trainer.processing_class.decode
    learned = decode([token for token, label in zip(tokens, labels, strict=True) if label != -100])
    assert (decode(tokens), learned) == trained


def test_templates_that_do_not_fit_are_refused(tmp_path):
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}]))
    recipe = {"sft": "recipes/tiny/sft.yaml", "dpo": "recipes/tiny/dpo.yaml"}
    both = {"prompt": "{{ asked }}", "completion": "a", "dataset_name": file}
    with pytest.raises(HFTError, match=r"row 0 .*do not fit the columns question, answer: 'asked' is undefined"):
        load_data(hft.load_config("sft", recipe["sft"], model_name_or_path="a/b", **both).run, sft_rows, evaluate=False)
    rows = rows_of({"question": "q", "answer": 3})
    for prompt, message in (("{{ question + answer }}", "can only concatenate str"), ("{{ answer // 0 }}", "by zero")):
        with pytest.raises(HFTError, match=f"row 0 .*do not fit the columns question, answer: .*{message}"):
            rendered(rows, prompt, "{{ answer }}")
    with pytest.raises(HFTError, match=r"row 1 .*: a column is null"):
        sft_rows(rows_of({"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}), "x")
    dates = str(write_jsonl(tmp_path / "dates.jsonl", [{"instruction": "q", "output": "2024-03-01"}]))
    with pytest.raises(HFTError, match=r"row 0 .*a column of dates, .* save the rows as \.csv"):
        sft_rows(load_split(dates, "train"), "x")
    for prompt, completion in (("question", "answer"), ("{question}", "{answer}"), ("question", "{{ answer }}")):
        templates = both | {"prompt": prompt, "completion": completion}
        run = hft.load_config("sft", recipe["sft"], model_name_or_path="a/b", **templates).run
        with pytest.raises(HFTError, match=r"in braces, such as '\{\{ question \}\}'"):
            load_data(run, sft_rows, evaluate=False)
    with pytest.raises(HFTError, match="belong together; give both"):
        hft.load_config("sft", recipe["sft"], model_name_or_path="a/b", prompt="q")
    run = hft.load_config("dpo", recipe["dpo"], model_name_or_path="a/b", **both | {"prompt": "{{ question }}"}).run
    with pytest.raises(HFTError, match="it looks like demonstrations, which are for SFT"):
        load_data(run, preference_rows, evaluate=False)


def test_keys_of_messages_that_the_template_does_not_write_are_noted(tiny, tmp_path, capsys):
    spoken = {"role": "assistant", "content": "a", "reasoning_content": "think", "name": "bot"}
    trainer_of(tiny, [{"messages": [USER, ASSISTANT]}, {"messages": [USER, spoken]}] * 8, tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if "does not write it" in line]
    assert notes == [f"{key} of 8 rows: the chat template does not write it" for key in ("name", "reasoning_content")]


@pytest.mark.parametrize("given", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_not_to_be_trained_is_noted(tiny, tmp_path, capsys, given):
    trainer_of(tiny, [{"messages": [USER, ASSISTANT | given, USER, ASSISTANT]}] * 8, tmp_path)
    assert f"{next(iter(given))} of 8 rows: the chat template does not write it" in capsys.readouterr().out


def test_text_in_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    dataset, _ = sft_rows(rows_of({"messages": [USER, {"role": "assistant", "content": parts}]}), "x")
    assert dataset[0]["messages"] == [USER, {"role": "assistant", "content": "ab"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("user: hi", "messages must be a list of {role, content}, got 'user: hi'"),
        (None, "messages is null"),
        ([], "messages is empty"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\] has null for content"),
        ([USER, ASSISTANT, USER, {"role": "assistant", "content": None}], r"messages\[3\] has null for content"),
        ([USER, {"role": "bot", "content": "a"}], r"messages\[1\] has the unknown role 'bot'"),
        ([USER, {"role": "assistant", "content": 3}], r"messages\[1\]: content must be text, got 3"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], r"messages\[1\]: content has a part 'image'"),
        ([USER], "messages has no assistant turn"),
    ],
)
def test_the_first_bad_row_is_named_by_its_number(messages, message):
    good = {"messages": [USER, ASSISTANT]}
    with pytest.raises(HFTError, match=rf"dataset x, row 2 \(the first is 0\): {message}"):
        sft_rows(rows_of(good, good, {"messages": messages}, good), "x")


def test_blank_answers_are_dropped_and_counted():
    blank = {"messages": [USER, {"role": "assistant", "content": " \n"}]}
    dataset, notes = sft_rows(rows_of({"messages": [USER, ASSISTANT]}, blank, blank), "x")
    assert (len(dataset), notes) == (1, ["dataset x: dropped 2 with a blank answer, of 3 rows"])


def test_a_prompt_and_completion_of_another_role_is_refused():
    with pytest.raises(HFTError, match=r"completion\[0\] is a turn of the user, which would be trained"):
        sft_rows(rows_of({"prompt": "q", "completion": [USER]}), "x")


def test_pairs_that_differ_only_beyond_max_length_are_dropped_and_counted(tmp_path, dpo, pairs, capsys):
    same = {"prompt": "q", "chosen": "same " * 300 + "a", "rejected": "same " * 300 + "b"}
    file = write_jsonl(tmp_path / "same.jsonl", [same] * 8)
    assert dpo(tmp_path / "out", data=file) == 2
    assert "in every training pair the answers are the same tokens; raise max_length" in error_of(capsys)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*rows, preference_rows(rows_of(same), "x")[0][0]])
    assert dpo(tmp_path / "out", "--max_steps", "1", data=mixed) == 0
    dropped = "dropped 1 training pairs whose answers are the same tokens within max_length"
    assert dropped in capsys.readouterr().out


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.24"), reason="it finds where such turns end")
def test_a_tokenizer_whose_offsets_train_the_user_is_refused(tmp_path, sft, capsys):
    """A word-level tokenizer drops newlines, and with them where a turn of the assistant ends."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(["q a user assistant < > |"], trainers.WordLevelTrainer(special_tokens=special))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}] * 16)
    assert sft(tmp_path / "out", model=tmp_path / "model", data=rows) == 2
    assert "row 0 (the first is 0): assistant_only_loss trains more than the assistant's tokens" in error_of(capsys)


def test_an_id_without_an_embedding_is_refused_where_a_row_holds_it(tmp_path, tiny, sft, rows, capsys):
    """Gemma 3 1B's tokenizer has such an id, for images."""
    model = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(model)
    assert sft(tmp_path / "out", "--max_steps", "1", model=model) == 0
    note = "the tokenizer has 1 ids without a row in the embeddings, which have 2048, the first is 2048, '<|im_start|>'"
    assert note in capsys.readouterr().out
    odd = {"messages": [{"role": "user", "content": "<|im_start|>"}, ASSISTANT]}
    assert sft(tmp_path / "odd", model=model, data=write_jsonl(tmp_path / "odd.jsonl", [*rows, odd])) == 2
    assert "1 rows of dataset" in (message := error_of(capsys))
    assert "hold '<|im_start|>', id 2048, and the embeddings have 2048 rows" in message


def test_numbers_in_tool_calls_keep_their_digits():
    """Those that a dataset has: datasets' own JSON reader keeps ten decimals where rows have different keys."""
    arguments = {"x": 3.141592653589793, "y": 1e-12}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    stored = Dataset.from_list([{"messages": [USER, call], "chat_template_kwargs": {"t": 1e-11}}])
    dataset, _ = sft_rows(stored, "x")
    assert dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert dataset[0]["chat_template_kwargs"] == {"t": 1e-11}


def test_turns_of_others_in_a_preferred_answer_are_not_trained():
    good = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "b"}]}
    bad = good | {"chosen": [ASSISTANT, USER, ASSISTANT]}
    dataset, notes = preference_rows(rows_of(good, bad), "x")
    assert (len(dataset), notes) == (1, ["dataset x: dropped 1 that differ before the last answer, of 2 pairs"])


def test_other_spellings_of_sharegpt_are_read():
    turns = [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "a"}]
    dataset, _ = sft_rows(rows_of({"conversations": turns, "tools": ""}), "x")
    assert dataset[0] == {"messages": [USER, ASSISTANT], "tools": None, "row": 0}


def test_packing_counts_packed_rows_and_plans_their_steps(tmp_path, sft, capsys):
    flags = ["--packing", "true", "--max_steps", "-1", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
    assert sft(tmp_path / "out", *flags, "--global_batch_size", "4", method="dynamic") == 0
    text = capsys.readouterr().out
    assert "80 training rows, steps are known once the rows are packed" in text
    packed = int(text.partition("packed 80 training rows into ")[2].split()[0])
    steps = -(-packed // 4)
    assert f"{packed} rows, {steps} steps\n" in text
    assert f"  {steps} steps\n" in text
    assert "dropped" not in text
    assert "10 phases" in text or f"{steps} phases" in text


def test_a_data_file_that_changed_is_another_run(tmp_path, sft, rows, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert sft(tmp_path / "out", "--eval_strategy", "no", data=file) == 0
    (tmp_path / "out" / "results.json").unlink()
    write_jsonl(file, [*rows[1:], rows[0]])
    capsys.readouterr()
    assert sft(tmp_path / "out", "--max_steps", "6", data=file) == 2
    assert "it was trained with other settings (sha256 " in error_of(capsys)
