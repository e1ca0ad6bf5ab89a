"""The rows of a sequence: those of its tasks, and what its strategy makes of them in each round.

TRACE's folders (BeyonderXX/TRACE, arXiv 2310.06762) are `TASK/{train,eval,test}.json`, lists of `{"prompt", "answer"}`
whose prompts hold the instruction. `.jsonl` with the same fields is read too.
"""

import math
from pathlib import Path

from pydantic import TypeAdapter
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from hft.continual.config import SequencePlan, SequenceRun
from hft.errors import HFTError, reason
from hft.jsonl import read_jsonl, write_jsonl
from hft.methods.strategy import Row


class Example(TypedDict):
    prompt: str
    answer: str


class SequenceData:
    """The rows of a sequence: `train` and `tests` by task, and `alignment` if the strategy replays instructions."""

    def __init__(self, plan: SequencePlan):
        settings = plan.settings
        folder = Path(settings.trace_dir or "").expanduser()
        if not settings.trace_dir or not folder.is_dir():
            raise HFTError(f"trace_dir {settings.trace_dir} does not exist; it holds TASK/train.json and test.json")
        self.train = {task: read_task(folder, task, "train") for task in settings.tasks}
        self.tests = {task: read_task(folder, task, "test")[: settings.test_rows] for task in settings.tasks}
        replayed = settings.alignment if plan.strategy.takes_alignment else None
        self.alignment = read_task(folder, replayed, "train") if replayed else []
        self.notes = [note for task, rows in self.train.items() for note in notes_on(task, rows, self.tests[task])]

    def shorten(self, tokenizer: PreTrainedTokenizerBase, plan: SequencePlan) -> None:
        """Cut what is too long (`shortened`), and render the prompts of the test rows as `context`."""
        limits = (tokenizer, plan.settings.max_prompt_length, plan.settings.max_answer_length)
        self.alignment = shortened(self.alignment, *limits)
        for task, rows in self.tests.items():
            self.train[task] = shortened(self.train[task], *limits)
            short = shortened(rows, *limits)
            prompts = [[{"role": "user", "content": row["prompt"]}] for row in short]
            contexts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            for row, context, whole in zip(short, contexts, rows, strict=True):
                row.update(context=context, completion=whole["completion"])  # answers are compared with the whole
            self.tests[task] = short

    def rounds(self, plan: SequencePlan) -> list[list[SequenceRun]]:
        """The runs of each round: one on its task, and where the strategy has rows for it, a replay pass."""
        rounds: list[list[SequenceRun]] = []
        for number in range(len(self.train)):
            tasks, strategy = list(self.train.values())[: number + 1], plan.strategy
            rows, memory = strategy.training_rows(tasks, self.alignment), strategy.remembered_rows(tasks)
            previous = rounds[-1][-1].name if rounds else None
            rounds.append([plan.run(number, previous, rows, memory)])
            if replayed := strategy.replay_rows(tasks, self.alignment):
                rounds[-1].append(plan.run(number, rounds[-1][-1].name, replayed, [], replay=True))
        return rounds

    def write(self, plan: SequencePlan) -> None:
        for run in (run for runs in self.rounds(plan) for run in runs):
            write_jsonl(plan.data(run.name), run.rows)
            if run.memory:
                write_jsonl(plan.data(f"{run.name}-memory"), run.memory)
        for task, rows in self.tests.items():
            write_jsonl(plan.data(f"{task}-test"), rows)


def read_task(folder: Path, task: str, split: str) -> list[Row]:
    """The rows of one split of a task, without those whose answer is empty, as `prompt` and `completion`."""
    path = next((path for end in ("json", "jsonl") if (path := folder / task / f"{split}.{end}").is_file()), None)
    if path is None:
        raise HFTError(f"trace_dir {folder} lacks {task}/{split}, as .json or .jsonl; add it, or name other tasks")
    examples = TypeAdapter(list[Example])
    try:
        is_lines = path.suffix == ".jsonl"
        rows = examples.validate_python(read_jsonl(path)) if is_lines else examples.validate_json(path.read_bytes())
    except ValueError as error:
        raise HFTError(f"{path} is not a list of rows with prompt and answer: {reason(error)}") from error
    if not (kept := [row for row in rows if row["answer"].strip()]):
        raise HFTError(f"{path} has no row with an answer")
    return [{"prompt": row["prompt"], "completion": row["answer"]} for row in kept]


def notes_on(task: str, train: list[Row], test: list[Row]) -> list[str]:
    """What the files of a task hold that its numbers depend on: repeated rows, and test prompts that are trained on."""
    different = len({(row["prompt"], row["completion"]) for row in train})
    trained = {row["prompt"] for row in train}
    seen = sum(row["prompt"] in trained for row in test)
    notes = [f"{task}: {different:,} of {len(train):,} training rows are different"] if different < len(train) else []
    return notes + ([f"{task}: {seen:,} of {len(test):,} test prompts are also trained on"] if seen else [])


def shortened(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, longest_prompt: int, longest_answer: int
) -> list[Row]:
    """Rows whose rendered prompt, and answer with its EOS, have at most so many tokens.

    A long prompt loses its middle, so that instruction and last line stay; TRACE's code cuts the beginning.
    """
    empty = [{"role": "user", "content": ""}]
    around = tokenizer.apply_chat_template(empty, add_generation_prompt=True, tokenize=True, return_dict=True)
    room = max(1, longest_prompt - len(around.input_ids))

    def ends(text: str, first: int, last: int = 0) -> str:
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(tokens) <= first + last:
            return text
        return text[: tokens[first - 1][1]] + (text[tokens[-last][0] :] if last else "")

    return [
        row
        | {
            "prompt": ends(row["prompt"], math.ceil(room / 2), room // 2),
            "completion": ends(row["completion"], longest_answer - 1),
        }
        for row in tqdm(rows, desc="cutting rows that are too long", leave=False)
    ]
