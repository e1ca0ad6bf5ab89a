"""What a run needs is asked for at plan time: one sentence, before weights are loaded or anything is written."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.conftest import error_of

INSTALL = "needs a package: pip install"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report_to trackio", "report_to: TrackioCallback requires trackio to be installed. Run `pip"),
        ("--report_to carrier-pigeon", "report_to: carrier-pigeon is not supported, only "),
        ("--use_liger_kernel true", f"use_liger_kernel true {INSTALL} liger-kernel"),
        ("--deepspeed zero3.json", f"deepspeed zero3.json {INSTALL} 'half-fine-tuning[deepspeed]'"),
        ("--model_init_kwargs {attn_implementation:flash_attention_2}", f"flash_attention_2 {INSTALL} flash-attn"),
        ("--model_init_kwargs {attn_implementation:kernels-community/x}", f"kernels-community/x {INSTALL} kernels"),
        ("--model_init_kwargs {torch_dtype:float16}", "model_init_kwargs: torch_dtype is named dtype; rename it"),
        ("--model_init_kwargs {variant:fp16}", "variant would load other files than hft reads; remove it"),
        ("--model_init_kwargs {use_safetensors:false}", "use_safetensors would load other files than hft reads"),
        ("--completion_only_loss true", "completion_only_loss is about rows of prompt and completion, and those of "),
        ("--dataset_text_field content", "dataset_text_field content: text is read from a column named text"),
        ("--dataset_kwargs {skip_prepare_dataset:true}", "skip_prepare_dataset: rows are read as text or messages"),
        ("--optim galore_adamw", "optim galore_adamw with optim_args None: You need to install `galore_torch`"),
        ("--optim schedule_free_adamw", "You need to install `schedulefree`"),
        ("--optim sgd --optim_args betas", "optim sgd with optim_args betas: "),
        ("--optim_args eps=1e-3", "optim adamw_torch_fused ignores optim_args eps=1e-3; change one of them"),
        ("--optim_target_modules q_proj", "optim adamw_torch_fused ignores optim_target_modules q_proj; change "),
        (
            "--chat_template_path tulu",
            "chat template tulu is not a file; give a .jinja file, or one that comes with hft: ",
        ),
        (
            "--chat_template_path recipes",
            "chat template recipes is not a file; give a .jinja file, or one that comes with hft: raw.jinja",
        ),
        ("--lr_scheduler_type cosine_with_min_lr", "cosine_with_min_lr with lr_scheduler_kwargs None: One of min_lr"),
        ("--lr_scheduler_kwargs {power:2}", "unexpected keyword argument 'power'"),
        ("--eval_on_start true", "eval_on_start evaluates, and eval_strategy is no: add --eval_on_start false"),
        ("--fp16 true --use_cpu true", "fp16 needs a GPU: take bf16, or neither"),
        (
            "--log_level loud",
            "log_level: expected 'detail', 'debug', 'info', ",
        ),
        ("--model_name_or_path runs/none", "folder runs/none not found"),
        ("--model_name_or_path setup.py", "setup.py is a file; give the folder of a model"),
        ("--chat_template_path LATIN", "is not UTF-8; save it as UTF-8"),
    ],
)
def test_what_is_missing_is_one_sentence_and_nothing_is_written(tmp_path, sft, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("hft.runs.arguments.find_spec", lambda name: None)
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    words = flags.replace(":", ": ", 1).replace("LATIN", str(tmp_path / "latin.jinja")) if "{" in flags else flags
    words = words.replace("LATIN", str(tmp_path / "latin.jinja"))
    flag, _, value = words.partition(" ")
    assert sft(tmp_path / "out", *([flag, value] if "{" in flags else words.split())) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_what_the_trainer_asks_the_hub_for_in_vain_is_one_sentence(tmp_path, sft, capsys):
    assert sft(tmp_path / "out", "--push_to_hub", "true") == 2
    assert "https://huggingface.co" in error_of(capsys)


def test_a_mapping_holds_numbers_as_trl_reads_them(tmp_path, sft):
    (tmp_path / "more.yaml").write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-4}\n")
    from_file = ["--dry_run", "--config", "recipes/tiny/sft.yaml", str(tmp_path / "more.yaml")]
    assert sft(tmp_path / "out", *from_file) == 0
    given = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-4}']
    assert sft(tmp_path / "out", "--dry_run", *given) == 0


def test_what_is_not_used_is_noted(tmp_path, tiny, sft, capsys):
    more = ["--model_init_kwargs", '{"revision": "v2"}', "--lr_scheduler_type", "constant"]
    assert sft(tmp_path / "out", "--dry_run", *more) == 0
    out = capsys.readouterr().out
    assert f"revision v2 is not used: {tiny} is a folder" in out
    assert "lr_scheduler_type constant ignores warmup_steps 0.1" in out


def test_what_could_not_be_saved_is_refused(tmp_path, tiny, sft, capsys):
    shutil.copytree(tiny, tmp_path / "base")
    odd = {"eos_token_id": 2, "temperature": 0.9, "do_sample": False}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(odd))
    assert sft(tmp_path / "out", model=tmp_path / "base") == 2
    assert "the generation_config of" in (error := error_of(capsys))
    assert "`do_sample` is not set to `True`" in error


def test_rows_longer_than_the_positions_are_refused_or_noted(tmp_path, tiny, sft, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert sft(tmp_path / "out", model=tmp_path / "gpt2") == 2
    assert error_of(capsys) == "hft: max_length 256 exceeds the base's 64 positions; set --max_length 64"
    assert sft(tmp_path / "out", "--max_length", "64", "--dry_run", model=tmp_path / "gpt2") == 0
    assert sft(tmp_path / "out", "--max_length", "100000", "--dry_run") == 0
    assert "positions of the base, and its RoPE is not scaled" in capsys.readouterr().out
