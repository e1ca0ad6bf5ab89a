"""AlpacaEval 2: a model's answers in alpaca-eval's form, and what its judge said of them."""

import json
from dataclasses import replace
from pathlib import Path

from hft.errors import HFTError, reason
from hft.evaluation.evaluate import resolved, unscored
from hft.evaluation.generate import answers_to
from hft.evaluation.rows import read_rows
from hft.evaluation.subject import load_tokenizer, subject_of
from hft.evaluation.suites import Settings
from hft.machine import is_main, say
from hft.record.identity import digest
from hft.record.manifest import write_json
from hft.record.scores import Score, Scores

ALPACA = "alpaca"  # the suite
TASK = "alpaca_eval"
JUDGE = "weighted_alpaca_eval_gpt4_turbo"  # alpaca-eval 2's own, which the paper's Table 15 reads
LONGEST = 2048  # tokens of an answer
# Columns of alpaca-eval 0.6.6's leaderboard: a score and its standard error.
COLUMNS = {"length_controlled_winrate": "lc_standard_error", "win_rate": "standard_error"}


def score_alpaca(model: str, settings: Settings, out: Path) -> Scores:
    """Answer the prompts, once, and read what the judge said of the answers; no scores until it has."""
    subject = subject_of(model, settings.base)
    settings = resolved(ALPACA, subject, settings)
    prompts = _prompts(settings)[: settings.limit]
    scores = unscored(ALPACA, subject, settings, {TASK: digest(prompts)})
    # Named after all that the answers depend on: other answers have a name that no old verdict knows.
    key = digest([scores.inputs, scores.data, scores.settings, scores.versions, scores.dtype])[:8]
    folder, generator = out / f"alpaca_eval-{key}", f"{Path(model).name}-{key}"
    outputs, leaderboard = folder / "model_outputs.json", folder / JUDGE / "leaderboard.csv"
    if not outputs.exists():
        say(f"{model}: answers to {len(prompts):,} prompts")
        template = load_tokenizer(subject.tokenizer) if settings.chat else None
        chats = [[{"role": "user", "content": prompt["instruction"]}] for prompt in prompts]
        longest = settings.max_gen_toks or LONGEST
        answers = answers_to(chats, subject, template, replace(settings, max_gen_toks=longest))
        if is_main():
            rows = [prompts[n] | {"output": answer, "generator": generator} for n, answer in enumerate(answers)]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(outputs, rows)
    if leaderboard.exists():
        scores.scores = _read(leaderboard, generator)
        if is_main():
            scores.save(out)
    else:
        judge = f"alpaca_eval --model_outputs {outputs} --annotators_config {JUDGE}"
        say(f"{outputs} has the answers. The judge needs alpaca-eval (pip install alpaca-eval) and costs about 10 USD:")
        say(f"  OPENAI_API_KEY=... {judge}", "The same `hft eval` then reads its leaderboard.")
    return scores


def _prompts(settings: Settings) -> list[dict[str, str]]:
    if settings.data:
        return read_rows(Path(settings.data, f"{TASK}.jsonl"))
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download("tatsu-lab/alpaca_eval", f"{TASK}.json", repo_type="dataset")
    except OSError as error:
        raise HFTError(f"cannot fetch AlpacaEval's prompts: {reason(error)}; or give --data FOLDER") from error
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _read(leaderboard: Path, generator: str) -> list[Score]:
    """The judge's scores of one generator, among those of others that alpaca-eval adds."""
    import pandas as pd

    try:
        row = pd.read_csv(leaderboard, index_col=0).loc[generator]
        return [Score(TASK, name, row[name], row.get(error), int(row["n_total"])) for name, error in COLUMNS.items()]
    except (KeyError, ValueError, OSError) as error:
        raise HFTError(f"{leaderboard} has no scores of {generator}: {reason(error)}") from error
