"""`hft continual`: a command line in, an exit status out."""

from collections.abc import Sequence
from importlib.util import find_spec

from hft.config import to_yaml
from hft.continual.config import parse_sequence
from hft.continual.data import SequenceData
from hft.continual.planning import first_plan, plan_runs, table
from hft.continual.sequence import log_to_wandb, run_sequence, sequence_keys
from hft.errors import DoesNotFit, HFTError
from hft.machine import indented, is_main, leave_process_group, say

NEEDED = ("lm_eval", "rapidfuzz", "rouge_score", "scipy")
FILES = """
  NN-TASK/               the run of each round, with its manifest, results and scores
  data/                  the rows that each of them trained on, and test rows
  recipe.yaml            what they have in common
  sequence.yaml          what hft continual was given
  matrix.json            the scores, OP and BWT"""


def main(arguments: Sequence[str]) -> int:
    """Plan a sequence, print its commands, and run it: `--config RECIPE.yaml [METHOD.yaml ...] [--key value ...]`."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise HFTError(f"a sequence of tasks needs {', '.join(missing)}: pip install 'half-fine-tuning[continual]'")
    plan, machine = parse_sequence(arguments)
    data = SequenceData(plan)
    rounds = data.rounds(plan)
    say("resolved config", indented(to_yaml(sequence_keys(plan))))
    planned = plan_runs(plan, rounds, machine)
    say("runs", indented(table(planned)), "")
    if not plan.dry_run and (misfit := next((run.misfit for run in planned if run.too_large), None)):
        raise DoesNotFit(misfit)
    if not (machine.gpus or planned[0].too_large):
        first = first_plan(plan, rounds[0][0])
        say("first run", indented(first.report()))
    say(*(["notes on the data", indented("\n".join(data.notes)), ""] if data.notes else []))
    say("commands", *(f"  {plan.command(run)}" for runs in rounds for run in runs), "")
    if plan.dry_run:
        say("stopped here: no weights were loaded, nothing was written")
        say(f"the sequence writes {plan.out}/recipe.yaml and {plan.out}/data first, which the commands need")
        return 0
    matrix = run_sequence(plan, data)
    say("result", indented(matrix.table()), "", indented(matrix.report()), "", f"{plan.out}/{FILES}")
    if is_main() and "wandb" in first.args.report_to:
        say(log_to_wandb(plan, matrix))
    leave_process_group()
    return 0
