"""The rows of a sequence: those of its tasks, and what its strategy makes of them in each round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hft.continual.config import SequencePlan, SequenceRun
from hft.continual.tasks import check_folder, notes_on, read_task, shorten_rows
from hft.jsonl import write_jsonl
from hft.methods.strategy import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SequenceData:
    """The rows of a sequence.

    Attributes:
        train: training rows of each task, in the order of the tasks.
        tests: test rows of each task.
        alignment: rows of general instructions, if the strategy replays any.
        notes: what the files hold that the numbers depend on.
    """

    def __init__(self, plan: SequencePlan):
        settings = plan.settings
        extra = settings.alignment if plan.strategy.takes_alignment else None
        needed = dict.fromkeys(settings.tasks, "train test") | ({extra: "train"} if extra else {})
        folder = check_folder(settings.trace_dir, needed)
        self.train = [read_task(folder, task, "train") for task in settings.tasks]
        self.tests = {task: read_task(folder, task, "test")[: settings.test_rows] for task in settings.tasks}
        self.alignment = read_task(folder, extra, "train") if extra else []
        pairs = zip(settings.tasks, self.train, strict=True)
        self.notes = [note for task, rows in pairs for note in notes_on(task, rows, self.tests[task])]

    def shorten(self, tokenizer: PreTrainedTokenizerBase, plan: SequencePlan) -> None:
        """Cut what is too long (`shorten_rows`), and render the prompts of the test rows as `context`."""
        settings, tasks = plan.settings, plan.settings.tasks
        limits = (tokenizer, settings.max_prompt_length, settings.max_answer_length)
        self.train = [shorten_rows(rows, *limits, task) for task, rows in zip(tasks, self.train, strict=True)]
        self.alignment = shorten_rows(self.alignment, *limits, "the alignment set")
        for task, rows in self.tests.items():
            short = shorten_rows(rows, *limits, f"{task} (test)")
            # Answers are compared with the whole reference.
            self.tests[task] = [
                row | {"prompt": cut["prompt"], "context": rendered(cut["prompt"], tokenizer)}
                for row, cut in zip(rows, short, strict=True)
            ]

    def of_round(self, plan: SequencePlan, number: int) -> dict[str, list[Row]]:
        """The rows of a round from 0, by what they are for: `train`, `memory`, `replay`; the last two may be empty."""
        tasks, strategy = self.train[: number + 1], plan.strategy
        return {
            "train": strategy.training_rows(tasks, self.alignment),
            "memory": strategy.remembered_rows(tasks),
            "replay": strategy.replay_rows(tasks, self.alignment),
        }

    def runs(self, plan: SequencePlan) -> list[list[SequenceRun]]:
        """The runs of each round."""
        rounds: list[list[SequenceRun]] = []
        for number in range(len(plan.settings.tasks)):
            rows = self.of_round(plan, number)
            previous = rounds[-1][-1].name if rounds else None
            made = plan.runs_of(number, previous, remembers=bool(rows["memory"]), replays=bool(rows["replay"]))
            rounds.append(made)
        return rounds

    def write(self, plan: SequencePlan) -> None:
        """Write the rows of every run, and the test rows of every task."""
        for number, runs in enumerate(self.runs(plan)):
            rows = self.of_round(plan, number)
            write_jsonl(plan.data(runs[0].name), rows["train"])
            if rows["memory"]:
                write_jsonl(plan.data(f"{runs[0].name}-memory"), rows["memory"])
            if rows["replay"]:
                write_jsonl(plan.data(runs[1].name), rows["replay"])
        for task, rows in self.tests.items():
            write_jsonl(plan.data(f"{task}-test"), rows)


def rendered(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the chat template renders it, for the model to continue."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
