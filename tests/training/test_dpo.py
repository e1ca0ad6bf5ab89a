"""Preferences through the command line, and the reference that shares the frozen half."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from hft.cli import main
from hft.data import load_split, preference_rows
from hft.errors import HFTError
from hft.freezing import freeze, upcast
from hft.machine import cpu_has_bfloat16
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig
from hft.training import HFTDPOTrainer
from hft.training.reference import reference_bytes
from tests.conftest import error_of, finished_run, identical, losses, tensors, write_jsonl

LN2 = math.log(2)
# In fp32 tests/training/test_any_trainer.py says the same of every trainer.
UNDER_AUTOCAST = pytest.mark.skipif(not cpu_has_bfloat16(), reason="no bf16 in hardware")
AUTOCAST = [False, pytest.param(True, marks=UNDER_AUTOCAST)]
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, pairs):
    return finished_run("dpo", tmp_path_factory.mktemp("runs") / "finished", model=tiny, data=pairs)


def trainer(cls, model, pairs, out, *, autocast, **kwargs):
    settings = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_length": 256}
    settings |= {"gradient_checkpointing": False, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    args = DPOConfig(output_dir=str(out), bf16=autocast, **settings | kwargs.pop("settings", {}))
    return cls(model, args=args, train_dataset=load_split(str(pairs), "train"), **kwargs)


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(finished):
    history = json.loads((finished / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    start = next(row for row in history if "eval_loss" in row)
    first = next(row for row in history if "loss" in row)
    assert start["step"] == 0
    assert start["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[key] == start[f"eval_{key}"] == 0
    results = json.loads((finished / "results.json").read_text())
    assert results["objective"] == "dpo"
    assert results["held_out"]["loss"][0] == pytest.approx(LN2, abs=1e-6)
    assert set(results["held_out"]) == {"loss", "rewards/accuracies", "rewards/margins"}
    assert losses(finished / "checkpoint-4")[1] != LN2


@UNDER_AUTOCAST
def test_a_shared_reference_gives_the_losses_of_a_full_copy(tmp_path, tiny, pairs):
    full = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    shared = trainer(HFTDPOTrainer, str(tiny), pairs, tmp_path / "a", autocast=True)
    copied = trainer(HFTDPOTrainer, str(tiny), pairs, tmp_path / "b", autocast=True, ref_model=full)
    frozen = set(copied.selection.frozen_parameters)  # half precision in the policy, so in the full copy too
    for name, parameter in copied.ref_model.named_parameters():
        if name in frozen:
            parameter.data = parameter.data.bfloat16()
    shared.train()
    copied.train()
    assert [row["loss"] for row in logged(shared)] == [row["loss"] for row in logged(copied)]
    ours, theirs = shared.model.state_dict(), copied.model.state_dict()
    assert all(identical(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("autocast", AUTOCAST)
def test_the_reference_shares_the_frozen_half_and_never_moves(tmp_path, tiny, pairs, autocast):
    run = trainer(HFTDPOTrainer, str(tiny), pairs, tmp_path, autocast=autocast)
    frozen = set(run.selection.frozen_parameters)
    policy = dict(run.model.named_parameters())
    reference = dict(run.ref_model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in reference.items()}
    for name, parameter in reference.items():
        assert (parameter.data_ptr() == policy[name].data_ptr()) == (name in frozen), name

    # Embeddings and norms are held in fp32 as the policy's are; under autocast matrices stay in bf16.
    trained = [(name, p) for name, p in policy.items() if name not in frozen]
    wide = ("embed_tokens", "norm") if autocast else ("",)
    expected = sum(p.numel() * (4 if any(part in name for part in wide) else 2) for name, p in trained)
    assert reference_bytes(run) == expected
    full = sum(p.numel() * p.element_size() for p in reference.values())
    assert f"{expected / 1e9:.2f} GB instead of {full / 1e9:.2f} GB" in run.notes()[0]

    run.train()
    assert all(identical(before[name], parameter) for name, parameter in reference.items())
    assert all(not torch.equal(before[name].float(), parameter.float()) for name, parameter in trained)


def test_for_llama2_7b_the_reference_takes_7_3_gb(monkeypatch):
    """The bytes the docstring tells of, from the shapes alone."""
    from transformers import AutoConfig

    from hft.model.anatomy import anatomy_of, meta_model
    from hft.selection import select
    from hft.training.reference import reference_to_share, share_frozen

    model = meta_model(AutoConfig.from_pretrained("recipes/llama2-7b")).half()
    assert sum(p.nbytes for p in model.parameters()) / 1e9 == pytest.approx(13.48, abs=0.01)
    freeze(model, select(anatomy_of(model), SelectionConfig()))
    reference, stored = reference_to_share(model), {name: p.dtype for name, p in model.named_parameters()}
    upcast(model, autocast=True)
    share_frozen(reference, model, stored, autocast=True)
    own = [p for p, q in zip(reference.parameters(), model.parameters(), strict=True) if q.requires_grad]
    assert sum(p.nbytes for p in own) / 1e9 == pytest.approx(7.26, abs=0.01)


def test_reference_logps_can_be_computed_beforehand(tmp_path, tiny, pairs):
    kept = trainer(HFTDPOTrainer, str(tiny), pairs, tmp_path / "a", autocast=False)
    before = trainer(
        HFTDPOTrainer, str(tiny), pairs, tmp_path / "b", autocast=False, settings={"precompute_ref_log_probs": True}
    )
    assert before.ref_model is None
    assert "computed beforehand" in before.notes()[0]
    kept.train()
    before.train()
    ours, theirs = ([row["loss"] for row in logged(run)] for run in (before, kept))
    assert ours[0] == pytest.approx(LN2, abs=1e-6)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_run_cut_short_goes_on_exactly_where_it_was(tmp_path, dpo):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert dpo(straight, "--max_steps", "8", "--save_steps", "4") == 0
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoint-8")
    (cut / "results.json").unlink()
    (cut / "model.safetensors").unlink()
    assert dpo(cut, "--max_steps", "8", "--save_steps", "4") == 0
    ours, theirs = tensors(cut), tensors(straight)
    assert all(identical(ours[name], theirs[name]) for name in theirs)
    assert losses(cut / "checkpoint-8") == losses(straight / "checkpoint-8")
    assert dpo(cut, "--selection_seed", "1", "--resume_from_checkpoint", str(cut / "checkpoint-8")) == 2


def test_from_sft_to_dpo_each_round_draws_its_own_half(tmp_path, sft, dpo):
    first, second, third = (tmp_path / name for name in ("sft", "dpo", "again"))
    assert sft(first) == 0
    assert dpo(second, model=first) == 0
    assert dpo(third, model=second) == 0
    rounds = [Manifest.load(folder) for folder in (first, second, third)]
    assert [manifest.selection["round"] for manifest in rounds] == [1, 2, 3]
    assert len({tuple(manifest.frozen_units) for manifest in rounds}) == 3
    assert [entry["selection"]["round"] for entry in rounds[2].earlier] == [1, 2]
    assert rounds[2].earlier[0]["frozen_units"] == rounds[0].frozen_units
    assert rounds[1].base == str(first)
    assert AutoTokenizer.from_pretrained(third).chat_template == AutoTokenizer.from_pretrained(first).chat_template
    assert dpo(tmp_path / "same", "--round", "1", model=first) == 0
    assert Manifest.load(tmp_path / "same").frozen_units == rounds[0].frozen_units


def test_a_from_folder_must_be_what_its_manifest_tells(tmp_path, tiny, finished, dpo, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert dpo(tmp_path / "a", model=empty) == 2
    assert f"cannot read the config of {empty}" in error_of(capsys)

    swapped = shutil.copytree(finished, tmp_path / "swapped")
    content = tensors(swapped)
    name = next(iter(Manifest.load(swapped).frozen_checksums))
    content[name] = content[name] * 2
    save_file(content, swapped / "model.safetensors", metadata={"format": "pt"})
    assert dpo(tmp_path / "b", model=swapped) == 2
    assert f"{swapped} does not match its hft_manifest.json: {name} differs" in error_of(capsys)


def test_a_missing_template_is_told_before_anything_is_loaded(tmp_path, tiny, dpo, capsys):
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert dpo(tmp_path / "out", model=bare) == 2
    assert f"{bare} has no chat template" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_key_of_the_other_objective_is_refused(tmp_path, dpo, capsys):
    method = tmp_path / "assistant.yaml"
    method.write_text("method: assistant\nassistant_only_loss: true\n")
    words = ["dpo", "--config", "recipes/tiny/dpo.yaml", str(method)]
    assert main(words) == 2
    assert "'assistant_only_loss' is a key of sft, not of dpo" in error_of(capsys)


def test_prompts_that_fill_max_length_are_told_of(tmp_path, pairs, rows, dpo, capsys):
    assert dpo(tmp_path / "a", "--max_length", "8") == 2
    assert "in every training pair the prompt alone fills max_length 8" in error_of(capsys)
    long = {"prompt": [{"role": "user", "content": "word " * 300}], "chosen": [GOOD], "rejected": [BAD]}
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*load_split(str(pairs), "train").to_list(), long])
    assert dpo(tmp_path / "b", data=mixed) == 0
    assert "dropped 1 training pairs whose prompt alone fills max_length 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"source": "s", "prompt": "q", "chosen": [USER, GOOD], "chosen-rating": 5.0, "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 1.0},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
    ids=["H4 and allenai", "argilla", "trl-lib", "messages", "text prompt", "text"],
)
def test_the_common_layouts_come_down_to_one(row):
    dataset, _ = preference_rows(Dataset.from_list([row]), "x")
    assert dataset[0] == {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "row": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, GOOD]}, "has columns messages; needed are chosen and rejected .* demonstrations"),
        ({"question": "q", "better": "a"}, "has columns better, question; needed are chosen and rejected"),
        ({"chosen": "a", "rejected": "b"}, "row 0 .* chosen needs a prompt, in front of it as messages"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "row 0 .* needs a prompt, .* or in another column"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "no pair to learn from: 1 with equal answers"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "no pair to learn from: 1 with an empty answer"),
    ],
)
def test_another_form_is_refused_by_name(row, message):
    with pytest.raises(HFTError, match=message):
        preference_rows(Dataset.from_list([row]), "x")


def test_single_bad_pairs_are_dropped_and_counted():
    rows = [{"prompt": "q", "chosen": "a", "rejected": other} for other in ("b", "a", "", "c", "a")]
    dataset, notes = preference_rows(Dataset.from_list(rows), "x")
    assert [row["rejected"][0]["content"] for row in dataset] == ["b", "c"]
    assert notes == [
        "chosen and rejected are text, which becomes turns of the chat template",
        "dataset x: dropped 2 with equal answers, 1 with an empty answer, of 5 pairs",
    ]


def test_a_reference_that_follows_the_policy_is_refused(tmp_path, dpo, capsys):
    assert dpo(tmp_path / "out", "--sync_ref_model", "true") == 2
    assert "sync_ref_model would move the frozen half" in error_of(capsys)
    assert not (tmp_path / "out").exists()
