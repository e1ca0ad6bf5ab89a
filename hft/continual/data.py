"""The rows of a sequence: those of its tasks, and what its strategy makes of them in each round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hft.continual.config import SequencePlan, SequenceRun
from hft.continual.tasks import check_folder, notes_on, read_task, shorten_rows
from hft.jsonl import write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SequenceData:
    """The rows of a sequence: `train` and `tests` by task, and `alignment` if the strategy replays instructions."""

    def __init__(self, plan: SequencePlan):
        settings = plan.settings
        extra = settings.alignment if plan.strategy.takes_alignment else None
        needed = dict.fromkeys(settings.tasks, "train test") | ({extra: "train"} if extra else {})
        folder = check_folder(settings.trace_dir, needed)
        self.train = {task: read_task(folder, task, "train") for task in settings.tasks}
        self.tests = {task: read_task(folder, task, "test")[: settings.test_rows] for task in settings.tasks}
        self.alignment = read_task(folder, extra, "train") if extra else []
        self.notes = [note for task, rows in self.train.items() for note in notes_on(task, rows, self.tests[task])]

    def shorten(self, tokenizer: PreTrainedTokenizerBase, plan: SequencePlan) -> None:
        """Cut what is too long (`shorten_rows`), and render the prompts of the test rows as `context`."""
        limits = (tokenizer, plan.settings.max_prompt_length, plan.settings.max_answer_length)
        self.train = {task: shorten_rows(rows, *limits, task) for task, rows in self.train.items()}
        self.alignment = shorten_rows(self.alignment, *limits, "the alignment set")
        for task, rows in self.tests.items():
            short = shorten_rows(rows, *limits, f"{task} (test)")
            prompts = [[{"role": "user", "content": row["prompt"]}] for row in short]
            contexts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            cut = zip(rows, short, contexts, strict=True)  # answers are compared with the whole reference
            self.tests[task] = [row | {"prompt": s["prompt"], "context": context} for row, s, context in cut]

    def rounds(self, plan: SequencePlan) -> list[list[SequenceRun]]:
        """The runs of each round: one on its task, and where the strategy has rows for it, a replay pass."""
        rounds: list[list[SequenceRun]] = []
        for number in range(len(self.train)):
            tasks, strategy = list(self.train.values())[: number + 1], plan.strategy
            rows, memory = strategy.training_rows(tasks, self.alignment), strategy.remembered_rows(tasks)
            previous = rounds[-1][-1].name if rounds else None
            rounds.append([plan.run(number, previous, rows, memory, replay=False)])
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
