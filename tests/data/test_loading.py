import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hft.cli import main
from hft.config import RunConfig
from hft.data import load_data, load_split, sft_rows
from hft.errors import HFTError
from hft.evaluation.rows import general_texts
from tests.conftest import error_of, write_jsonl

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_demo_data_is_plentiful_distinct_and_reproducible(tmp_path, capsys):
    assert main(["demo", str(tmp_path)]) == 0
    files = [Path(line.partition(":")[0]) for line in capsys.readouterr().out.splitlines()]
    made = {
        f"{stage}/{split}": [json.loads(line) for line in (tmp_path / stage / f"{split}.jsonl").open()]
        for stage in ("sft", "dpo")
        for split in ("train", "test")
    }
    train, test = made["sft/train"], made["sft/test"]
    answers = [row["messages"][1]["content"] for row in train + test]
    assert len(answers) == len(set(answers)) >= 1000
    assert any("Remove any common leading whitespace" in answer for answer in answers)
    drift = " ".join(general_texts())
    assert not [answer for answer in answers if answer in drift]
    assert len(train) / 15 < len(test) < len(train) / 6
    chosen, held_out = (
        {message["content"] for row in made[f"dpo/{split}"] for message in row["chosen"] + row["rejected"]}
        for split in ("train", "test")
    )
    assert not chosen & held_out
    # Made again, the other files are the same, and what is another's is left alone.
    files[-1].write_text("mine")
    before = {file: file.stat().st_mtime_ns for file in files}
    assert main(["demo", str(tmp_path)]) == 2
    assert f"{files[-1]} is not what hft demo writes" in error_of(capsys)
    assert {file: file.stat().st_mtime_ns for file in files} == before


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "prompt": "ignored", "id": 1},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_chats_in_either_spelling_become_messages(row):
    dataset, notes = sft_rows(Dataset.from_list([row]), "x")
    assert dataset[0] == {"messages": [USER, ASSISTANT], "row": 0}
    assert notes == (["columns not used: prompt, id"] if "id" in row else [])


@pytest.mark.parametrize("prompt", ["q", [USER]])
def test_prompt_and_completion_become_a_chat(prompt):
    row = {"prompt": prompt, "completion": [ASSISTANT]}
    dataset, notes = sft_rows(Dataset.from_list([row | {"source": "s"}]), "x")
    assert dataset[0] == {"prompt": [USER], "completion": [ASSISTANT], "row": 0}
    assert notes == ["columns not used: source"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"q": "a"}], "has columns q; needed are messages, or prompt and completion, as columns or as keys"),
        ([{"text": "a"}, {"text": None}], r"row 1 \(the first is 0\): text must be text, got null"),
        ([{"text": " "}], "has no row to learn from: 1 with a blank answer"),
        ([{"chosen": "a", "rejected": "b"}], "it looks like preferences"),
        ([{"messages": "a"}], "must be a list of {role, content}, got 'a'"),
        (
            [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}],
            r"dataset x, row 1 \(the first is 0\): messages has no assistant turn",
        ),
        ([{"prompt": "q", "completion": ""}], "has no row to learn from: 1 with a blank answer"),
    ],
)
def test_another_form_is_refused_by_name(rows, message):
    with pytest.raises(HFTError, match=message):
        sft_rows(Dataset.from_list(rows), "x")


def test_cells_of_a_csv_file_are_text(tmp_path):
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    (tmp_path / "set" / ".cache" / "index.json").write_text("{}")  # which is no part of the set
    cells = ["02108", "0.50", "12345678901234567890", "true", "NA", "None", "2024-03-01", "007,012"]
    for path in (tmp_path / "one.csv", tmp_path / "set" / "train.csv"):
        path.write_text("instruction,output\n" + "".join(f'q,"{cell}"\n' for cell in cells))
    for name in (tmp_path / "one.csv", tmp_path / "set"):
        rows, _ = sft_rows(load_split(str(name), "train"), "x")
        assert [row[0]["content"] for row in rows["completion"]] == cells


def test_several_datasets_are_one_and_each_is_counted(tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": [USER], "completion": [ASSISTANT]}] * 30)
    (tmp_path / "alpaca.csv").write_text("instruction,input,output\n" + "q,,a\nq,x,a\n" * 10)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}] * 3)

    def load(*names, **settings):
        run = RunConfig(dataset_name=[str(name) for name in names], dataset_test_split=None, eval_rows=2, **settings)
        return load_data(run, sft_rows, evaluate=True)

    both = load(chats, tmp_path / "alpaca.csv")
    assert (len(both.train), len(both.test)) == (46, 4)
    asked = {row["prompt"][0]["content"] for row in both.train}
    assert asked == {"q", "q\n\nx"}
    assert f"dataset {chats}: 28 of 28 training rows" in both.notes
    weighted = load(chats, tmp_path / "alpaca.csv", dataset_weights=[1, 3])
    counts = [int(note.split(": ")[1].split()[0]) for note in weighted.notes if "training rows" in note]
    assert sum(counts) == len(weighted.train)
    assert counts[1] == 18
    assert 2 <= counts[0] <= 10
    assert weighted.fingerprint != both.fingerprint
    with pytest.raises(HFTError, match="hold rows in different forms"):
        load(chats, text)
    with pytest.raises(HFTError, match="a number above 0 for each"):
        load(chats, text, dataset_weights=[1])


def test_a_file_in_another_encoding_is_refused_by_name(tmp_path):
    row = '{"prompt": "é", "completion": "a"}\n'
    for encoding in ("latin-1", "utf-16"):
        file = tmp_path / f"{encoding}.jsonl"
        file.write_bytes(row.encode(encoding))
        with pytest.raises(HFTError, match=rf"{encoding}.jsonl is not UTF-8; save it as UTF-8"):
            load_data(RunConfig(dataset_name=str(file)), sft_rows, evaluate=False)


def test_a_missing_or_empty_dataset_is_told_in_a_sentence(tmp_path):
    with pytest.raises(HFTError, match=r"nowhere\.jsonl does not exist"):
        load_split("nowhere.jsonl", "train")
    with pytest.raises(HFTError, match="is empty"):
        load_split(str(write_jsonl(tmp_path / "empty.jsonl", [])), "train")
    with pytest.raises(HFTError, match="cannot load dataset some/where"):
        load_split("some/where", "train")
    (tmp_path / "broken.jsonl").write_text('{"messages": [')
    with pytest.raises(HFTError, match="is not JSON Lines: line 1"):
        load_split(str(tmp_path / "broken.jsonl"), "train")
    (tmp_path / "comma.jsonl").write_text('{"text": "a"}\n{"text": "b"},\n')
    with pytest.raises(HFTError, match=r"comma\.jsonl is not JSON Lines: line 2: Extra data"):
        load_split(str(tmp_path / "comma.jsonl"), "train")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(HFTError, match=r"not \.txt"):
        load_split(str(tmp_path / "a.txt"), "train")


def test_held_out_rows_come_from_the_test_split_or_are_taken_from_train(data, tmp_path, rows):
    def load(evaluate=True, **settings):
        return load_data(RunConfig(**settings), sft_rows, evaluate=evaluate)

    found = load(dataset_name=str(data), eval_rows=5)
    assert (len(found.train), len(found.test)) == (80, 5)
    assert found.test[0]["messages"] == rows[80]["messages"]
    file = str(write_jsonl(tmp_path / "one.jsonl", rows))
    found = load(dataset_name=file, eval_rows=8)
    assert (len(found.train), len(found.test)) == (88, 8)
    questions = [{row["messages"][0]["content"] for row in split} for split in (found.train, found.test)]
    assert not questions[0] & questions[1]
    assert load(evaluate=False, dataset_name=file).test is None
    sliced = load(dataset_name=file, dataset_train_split="train[:90%]", dataset_test_split="train[90%:]")
    assert (len(sliced.train), len(sliced.test)) == (86, 10)
    for split, other in (("train", "train[90%:]"), ("test+train", "test[:5]")):
        with pytest.raises(HFTError, match="would train and be evaluated on; choose another --dataset_test_split"):
            load(dataset_name=str(data), dataset_train_split=split, dataset_test_split=other)
    with pytest.raises(HFTError, match="has no split 'dev' to evaluate on, only train"):
        load(dataset_name=file, dataset_test_split="dev", eval_rows=8)
    with pytest.raises(HFTError, match="has no split to evaluate on: hold rows out"):
        load(dataset_name=file)
    with pytest.raises(HFTError, match="cannot hold 96 rows out of the 96"):
        load(dataset_name=file, eval_rows=96)
    # Another split is evaluated on where it is named, and never guessed.
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "validation"):
        write_jsonl(folder / f"{name}.jsonl", rows[:10])
    with pytest.raises(HFTError, match="has no split 'test' to evaluate on, only train, validation: name one with"):
        load(dataset_name=str(folder), eval_rows=4)
    held_out = load(dataset_name=str(folder), dataset_test_split=None, eval_rows=4)
    assert held_out.notes == ["evaluation: 4 rows held out of train; unused splits: validation"]
    found = load(dataset_name=str(folder), dataset_test_split="validation", eval_rows=4)
    assert (len(found.train), len(found.test)) == (10, 4)
    assert found.notes == ["evaluation: 4 of 10 rows of split validation"]


def rendered(tokenizer, messages, **kwargs):
    """Text, and the text of those tokens that the loss falls on."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **kwargs)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return tokenizer.decode(ids), tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def test_the_tulu_template_is_tulus(tiny):
    """The format of open-instruct's encode_with_messages_format, and where its loss falls."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "One?\n"},
        {"role": "assistant", "content": " 1 "},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    text, learnt = rendered(tokenizer, chat)
    assert text == (
        "<s><|system|>\nBe brief.\n<|user|>\nOne?\n<|assistant|>\n1</s>\n<|user|>\nTwo?\n<|assistant|>\n2</s>"
    )
    assert learnt == "1</s>\n2</s>"
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|assistant|>\n")


def test_the_smollm2_template_trains_the_end_of_a_turn(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = Path("hft/demo/templates/smollm2.jinja").read_text()
    text, learnt = rendered(tokenizer, [USER, ASSISTANT])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert learnt == "a<|im_end|>"


def test_a_revision_of_a_hub_dataset_is_asked_for_everywhere(monkeypatch):
    """The rows, the names of the splits, and what identifies them."""
    asked, rows = [], Dataset.from_list([{"messages": [USER, ASSISTANT]}] * 3)

    def answer(value):
        return lambda *names, revision=None, **more: asked.append(revision) or value

    builder = type("Builder", (), {"hash": "abc"})
    monkeypatch.setattr("datasets.load_dataset", answer(rows))
    monkeypatch.setattr("datasets.get_dataset_split_names", answer(["train"]))
    monkeypatch.setattr("datasets.load_dataset_builder", answer(builder))
    run = RunConfig(dataset_name="owner/name", dataset_revision="v2", eval_rows=1)
    loaded = load_data(run, sft_rows, evaluate=True)
    assert asked == ["v2", "abc", "abc"]
    assert loaded.fingerprint["revision"] == "abc"


def test_what_datasets_saved_is_loaded(tmp_path):
    rows = Dataset.from_list([{"messages": [USER, ASSISTANT]}] * 8)
    rows.save_to_disk(tmp_path / "one")
    rows.train_test_split(2, seed=0).save_to_disk(tmp_path / "both")
    held, given = "3 rows held out of train", "2 of 2 rows of split test"
    for name, counts, note in (("one", (5, 3), held), ("both", (6, 2), given)):
        found = load_data(RunConfig(dataset_name=str(tmp_path / name), eval_rows=3), sft_rows, evaluate=True)
        assert (len(found.train), len(found.test)) == counts
        assert found.notes == [f"evaluation: {note}"]
        assert found.train[0]["messages"] == [USER, ASSISTANT]


def test_a_file_of_the_same_time_and_size_is_read_again(tmp_path):
    """As `cp -p` and `rsync -t` leave it; the same for a folder, and for all that is cached of the rows."""

    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "rows.jsonl", tmp_path / "folder" / "train.jsonl"):
        seen = {}
        for answer in ("old", "new"):
            chat = [USER, ASSISTANT | {"content": answer}]
            write_jsonl(path, [{"messages": chat}])
            os.utime(path, ns=(1_700_000_000 * 10**9,) * 2)
            name = str(path if path.parent == tmp_path else path.parent)
            loaded = load_data(RunConfig(dataset_name=name), sft_rows, evaluate=False)
            assert loaded.train[0]["messages"] == chat
            seen[answer] = loaded.fingerprint
        assert seen["old"] != seen["new"]


def test_a_files_name_is_no_pattern(tmp_path):
    """`train[1].jsonl`, as browsers name a second download, would be `train1.jsonl` too."""
    for name in ("train1", "train[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": [USER, ASSISTANT | {"content": name}]}])
    loaded = load_split(str(tmp_path / "train[1].jsonl"), "train")
    assert [row["messages"][1]["content"] for row in loaded] == ["train[1]"]
    loaded.save_to_disk(tmp_path / "saved[1]")
    assert load_split(str(tmp_path / "saved[1]"), "train")[:] == loaded[:]
