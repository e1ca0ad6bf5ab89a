import subprocess
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from hft.cli import COMMANDS, main
from hft.config import Keys, RunConfig, read_arguments, read_yaml, to_yaml
from hft.errors import HFTError
from hft.merging.config import MergeConfig
from hft.methods import all_classes
from hft.objectives import OBJECTIVES, find_objective
from hft.planning.memory import Engine, memory_of
from hft.runs.arguments import accumulation_steps, machine_settings, training_arguments
from hft.runs.config import is_neutral, load_config, parse_config
from hft.runs.plan import load_model_config, plan_selection
from hft.selection import SelectionConfig

RECIPES = sorted(path for objective in OBJECTIVES for path in Path("recipes").glob(f"*/{objective}.yaml"))
# LoTA trains a core that a run has found (tests/cpi).
METHODS = sorted(path for path in Path("recipes/methods").glob("*.yaml") if path.stem != "lota")
KEYS = Keys((RunConfig, SelectionConfig, SFTConfig))


def resolve(*words):
    """The typed values that a command line gives, and those of its flags."""
    return read_arguments(words, "hft", "", {}).resolve(KEYS)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_later_files_and_then_flags_win(tmp_path):
    a = write(tmp_path / "a.yaml", "max_steps: 1\nlearning_rate: 2e-5\nseed: 1")
    b = write(tmp_path / "b.yaml", "max_steps: 2\nseed: 2")
    values, flags = resolve("--config", a, b, "--seed", "3", "--freeze", "q_proj", "k_proj")
    assert values == {"max_steps": 2, "learning_rate": 2e-5, "seed": 3, "freeze": ["q_proj", "k_proj"]}
    assert flags == {"seed": 3, "freeze": ["q_proj", "k_proj"]}
    assert resolve("--resume_from_checkpoint")[0] == {"resume_from_checkpoint": "true"}
    assert resolve("--bf16", "--seed=1", f"--config={a}") == (
        {"max_steps": 1, "learning_rate": 2e-5, "seed": 1, "bf16": True},
        {"seed": 1, "bf16": True},
    )


def test_yaml_values_become_the_type_of_their_key(tmp_path):
    text = "learning_rate: 1e-3\nbf16: true\nmax_length: null\nwarmup_steps: 0.3\nmodel_init_kwargs: {a: 1}\n"
    values, _ = resolve("--config", write(tmp_path / "a.yaml", text + "eval_strategy: no\npacking: off\nreport_to: a"))
    assert values == {
        "learning_rate": 1e-3,
        "bf16": True,
        "max_length": None,
        "warmup_steps": 0.3,
        "model_init_kwargs": {"a": 1},
        "eval_strategy": "no",
        "packing": False,
        "report_to": "a",
    }
    assert resolve("--config", write(tmp_path / "b.yaml", to_yaml(values)))[0] == values


def test_a_folder_below_home_is_one_in_files_and_after_an_equals_sign_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path / "a.yaml", "output_dir: ~/out\nprompt: ~\nchat_template_path: ~/a.jinja")
    values, _ = resolve("--config", file, "--model_name_or_path=~/base", "--completion=~/{{ path }}")
    paths = {"output_dir": "out", "chat_template_path": "a.jinja", "model_name_or_path": "base"}
    below = {key: f"{tmp_path}/{name}" for key, name in paths.items()}
    assert values == below | {"prompt": None, "completion": "~/{{ path }}"}
    merge = read_arguments(["--out=~/merged"], "hft merge", "", {}).resolve(Keys((MergeConfig,)))[0]
    assert merge == {"out": f"{tmp_path}/merged"}


# Numbers that cannot be meant.
NO_NUMBERS = """
    max_length=0 num_train_epochs=-1 num_train_epochs=nan gradient_accumulation_steps=-2 logging_steps=-1 eval_rows=0
    eval_rows=-3 learning_rate=inf learning_rate=nan weight_decay=nan weight_decay=-1 per_device_eval_batch_size=0
    eval_accumulation_steps=0 dataloader_num_workers=-1 save_steps=0 global_batch_size=0 warmup_steps=-1 eval_steps=-0.5
    max_grad_norm=inf
"""


def test_numbers_that_are_meant_are_taken():
    words = "--max_steps -1 --max_length none --logging_steps 0.5 --save_steps 0.1 --eval_steps 0.5 --warmup_steps 0"
    words += " --pad_to_multiple_of auto --learning_rate 0 --max_grad_norm 0 --save_total_limit 0 --local_rank -1"
    values, _ = resolve(*words.split())
    assert values["max_length"] is None
    assert (values["logging_steps"], values["save_steps"], values["pad_to_multiple_of"]) == (0.5, 0.1, "auto")
    assert resolve("--pad_to_multiple_of", "8")[0] == {"pad_to_multiple_of": 8}
    own = make_dataclass("Own", [("beta", float, -1.0)])  # a user's method may call its keys as TRL calls others
    assert Keys((own,)).convert("beta", -2) == -2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate', did you mean 'learning_rate'?"),
        ("warmup_ratio: 0.3", "unknown key 'warmup_ratio'"),
        ("per_device_train_batch_size: 4.5", "per_device_train_batch_size: expected an integer, got 4.5"),
        ("num_train_epochs: [2]", "num_train_epochs: expected a number, got [2]"),
        ("learning_rate: fast", "learning_rate: expected a number, got 'fast'"),
        ("learning_rate: true", "learning_rate: expected a number, got true"),
        ("assistant_only_loss: 2", "assistant_only_loss: expected true or false, got 2"),
        ("fraction: {a: 1}", "fraction: expected a number, got {'a': 1}"),
        ("learning_rate: null", "learning_rate: expected a number, got null"),
        ("max_length: 4:16", "max_length: expected an integer, got '4:16'"),
        ("dataset_weights: [1, .nan]", "dataset_weights: expected a finite number, got [1, nan]"),
        ("learning_rate: .inf", "learning_rate: expected a finite number, got inf"),
        ("max_length: -5", "max_length: expected a number greater than 0, got -5"),
        ("pad_to_multiple_of: 0", "pad_to_multiple_of: expected a number greater than 0, got 0"),
        ("num_train_epochs: 0", "num_train_epochs: expected a number greater than 0, got 0"),
        ("- a", "must be a YAML mapping"),
        ("a: [", "is not valid YAML"),
        ("", "must be a YAML mapping"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice"),
    ],
)
def test_a_wrong_file_is_one_line_and_status_2(tmp_path, capsys, text, message):
    path = write(tmp_path / "wrong.yaml", text)
    assert main(["sft", "--config", path]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert path in err
    assert err.count("\n") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "none.yaml"], "cannot read none.yaml: no such file or recipe; `hft recipes` lists"),
        (["--config", "lama2-7b/sft"], "no such file or recipe, did you mean 'llama2-7b/sft'?"),
        (["--config", "tiny/sft", "htf"], "cannot read htf: no such file or recipe, did you mean 'hft'?"),
        (["--lerning_rate", "1"], "unknown key 'lerning_rate', did you mean 'learning_rate'?"),
        (["--max_step", "1"], "unknown key 'max_step', did you mean 'max_steps'?"),
        (["--lr", "1"], "unknown key 'lr', did you mean 'learning_rate'?"),
        (["--torch_dtype", "x"], "unknown key 'torch_dtype', did you mean 'model_init_kwargs: {dtype: float32}'?"),
        (["--load_in_4bit"], "unknown key 'load_in_4bit', did you mean 'adapter: qlora'?"),
        (["--config", "recipes/tiny/sft.yml"], "no such file or recipe, did you mean 'sft.yaml'?"),
        (["--max_steps", "x"], "max_steps: expected an integer, got 'x'"),
        (["--output_dir"], "output_dir: expected text, got no value"),
        (["--max_steps"], "max_steps: expected an integer, got no value"),
        (["--freeze", "--dry_run"], "freeze: expected a list, got no value"),
        (["--pad_to_multiple_of", "0"], "expected a number greater than 0, got '0'"),
        *(([f"--{word}"], f"{word.split('=')[0]}: expected a ") for word in NO_NUMBERS.split()),
        (["--max_steps", "1", "2"], "max_steps: expected an integer, got ['1', '2']"),
        (
            ["--config", "recipes/tiny/sft.yaml", "--fraction", "1.5"],
            "fraction: expected a number less than or equal to 1, got '1.5'",
        ),
        (["--sample_packing", "true"], "unknown key 'sample_packing', did you mean 'packing'?"),
        (["--update", "mufo"], "update: unknown update 'mufo', did you mean 'mofo'?"),
        (["--max_steps", "1"], "model_name_or_path and dataset_name are needed"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(capsys, words, message, tiny):
    if "recipes/tiny/sft.yaml" in words:
        words = [*words, "--model_name_or_path", str(tiny)]
    assert main(["sft", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.count("\n") == 0


@pytest.mark.parametrize(
    ("recipe", "method"),
    # Every recipe, and with those of two models every method.
    [
        (recipe, m)
        for recipe in RECIPES
        for m in METHODS
        if recipe.parent.name in ("tiny", "llama2-7b") or m.stem == "hft"
    ],
    ids=lambda path: path.stem if path.parent.name == "methods" else f"{path.parent.name}-{path.stem}",
)
def test_every_recipe_and_every_method_make_a_config(tmp_path, recipe, method, tiny):
    flags, given = {"output_dir": str(tmp_path)}, read_yaml(recipe)
    if given["model_name_or_path"].startswith("models/"):  # made by `hft fetch`
        flags["model_name_or_path"] = str(tiny)
    if recipe.stem != "sft" and method.stem == "kl":
        with pytest.raises(HFTError, match=f"'kl_to_base' is a key of sft, not of {recipe.stem}"):
            load_config(recipe.stem, recipe, method, **flags)
        return
    config = load_config(recipe.stem, recipe, method, **flags)
    if recipe.stem != "sft" and method.stem == "p-tuning-v2":  # the policy would not start at the reference
        with pytest.raises(HFTError, match="cannot train against a reference"):
            training_arguments(config, machine_settings(config.values))
        return
    # Recipes for GPUs cannot set bf16 without a GPU.
    args, _ = training_arguments(config, machine_settings(config.values))
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == config.run.global_batch_size
    assert args.activation_checkpointing is given.get("activation_checkpointing", True)
    assert recipe.stem != "sft" or Path(args.chat_template_path).is_file()
    if config.method.adapter:  # tests/methods/test_adapters.py puts them on a model
        config.method.adapter.peft_config()
        return
    selection = plan_selection(config, load_model_config(config))
    if method.stem == "hft-ratio":  # a third of what a layer mostly is
        assert 0.2 < selection.fraction_of_layers < 0.4
        return
    settings = config.method.selection
    if ":" in settings.policy:  # of one's own
        assert 0 < selection.fraction_of_layers <= 1
        return
    expected, close = (
        (1.0 if settings.policy == "all" else settings.fraction),
        0.1 if settings.policy == "model" else 1e-3,
    )
    assert selection.fraction_of_layers == pytest.approx(expected, abs=close)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_method_has_a_plan_for_8_gpus_of_80_gib(tmp_path, objective):
    """Llama-2-7B before activations. OSF, which is not in the paper's tables, keeps its factors whole on each GPU."""
    for method in (path for path in METHODS if objective == "sft" or path.stem != "kl"):
        config = load_config(objective, f"recipes/llama2-7b/{objective}.yaml", method, output_dir=str(tmp_path))
        selection, shards = plan_selection(config, load_model_config(config)), 8 if config.method.shardable else 1
        memory = memory_of(
            config.method, selection, Engine(8, shards), reference=config.objective.has_reference(config.values)
        )
        assert memory.total < 40 * 2**30 or method.stem == "osf", method


def test_the_tulu_recipe_holds_the_papers_values():
    recipe = yaml.safe_load(Path("recipes/llama2-7b/sft.yaml").read_text())
    paper = {"learning_rate": 2e-5, "warmup_steps": 0.3, "num_train_epochs": 2, "global_batch_size": 128}
    assert paper.items() <= {**recipe, "learning_rate": float(recipe["learning_rate"])}.items()
    assert recipe["max_length"] == 4096
    assert recipe["dataset_name"] == "allenai/tulu-v2-sft-mixture"


def test_the_ultrafeedback_recipes_hold_the_papers_values():
    lengths = {"llama2-7b": 2048, "llama2-13b": 1024, "llama3-8b": 2048}
    for name, length in lengths.items():
        recipe = yaml.safe_load(Path(f"recipes/{name}/dpo.yaml").read_text())
        assert float(recipe["learning_rate"]) == 5e-7
        assert (recipe["global_batch_size"], recipe["max_length"], recipe["beta"]) == (32, length, 0.1)
        assert (recipe["warmup_steps"], recipe["num_train_epochs"]) == (0.1, 3)
        if name.startswith("llama2"):  # the paper has these
            assert recipe["dataset_name"] == "HuggingFaceH4/ultrafeedback_binarized"
            assert recipe["model_name_or_path"] == f"runs/{name}-sft-fft"
        assert recipe["chat_template_path"] == "tulu.jinja"  # from tulu-2 as from an SFT run


def test_the_name_tells_what_a_flag_changed(tiny):
    def name(*words):
        files = ["--config", "recipes/tiny/sft.yaml", "recipes/methods/fft.yaml"]
        return parse_config("sft", [*files, *words]).values["run_name"]

    assert name() == "tiny-sft-fft"
    assert name("--report_to", "none", "--logging_steps", "20", "--push_to_hub", "--save_steps", "5") == "tiny-sft-fft"
    assert name("--dataset_name", "a/b.jsonl", "c/d.jsonl") == "tiny-sft-fft-dataset_name=b.jsonl+d.jsonl"
    assert name("--max_steps", "3", "--dataset_name", "a/b.jsonl") == "tiny-sft-fft-max_steps=3-dataset_name=b.jsonl"
    assert name("--model_name_or_path", "elsewhere/tiny-sft-hft") == "tiny-sft-fft-from-tiny-sft-hft"
    assert name("--output_dir", "none", "--run_name", "none", "--dataset_test_split", "none") == (
        "tiny-sft-fft-dataset_test_split=None"
    )
    assert name("--run_name", "mine") == name("--output_dir", "some/mine") == "mine"
    assert len(name("--dataset_name", "x" * 300)) <= 120


NEUTRAL_FIELDS = """
    activation_checkpointing activation_checkpointing_kwargs batch_eval_metrics bf16 bf16_full_eval
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict
    do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps
    eval_use_gather_object fp16_full_eval gradient_checkpointing gradient_checkpointing_kwargs hub_always_push
    hub_model_id hub_private_repo hub_revision hub_strategy hub_token include_for_metrics
    include_num_input_tokens_seen local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy output_dir prediction_loss_only project push_to_hub report_to
    resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit
    skip_memory_metrics torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_cpu
"""
NAMING_FIELDS = """
    accelerator_config activation_offloading adam_beta1 adam_beta2 adam_epsilon assistant_only_loss auto_find_batch_size
    average_tokens_across_devices beta chat_template_path completion_only_loss data_seed dataloader_drop_last
    dataset_kwargs dataset_text_field deepspeed desirable_weight disable_dropout discopop_tau eos_token eval_packing
    eval_strategy f_alpha_divergence_coef f_divergence_type fp16 fsdp fsdp_config full_determinism
    gradient_accumulation_steps greater_is_better ignore_data_skip kl_to_base label_names label_smoothing
    label_smoothing_factor ld_alpha learning_rate length_column_name liger_kernel_config load_best_model_at_end
    loss_type loss_weights lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length max_steps
    metric_for_best_model model_init_kwargs
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules packing packing_strategy pad_token
    pad_to_multiple_of padding_free parallelism_config per_device_eval_batch_size per_device_train_batch_size
    precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha ref_model_sync_steps remove_unused_columns
    restore_callback_states_from_checkpoint router_aux_loss_coef seed shuffle_dataset sync_ref_model tf32 torch_compile
    torch_compile_backend torch_compile_mode train_sampling_strategy truncation_mode trust_remote_code
    undesirable_weight use_cache use_liger_kernel use_weighting warmup_steps weight_decay
"""


def test_every_key_of_trl_says_what_is_computed_or_how():
    """A new one must be put on either side."""
    keys = {f.name for name in OBJECTIVES for f in fields(find_objective(name).config)}
    neutral = {key for key in keys if is_neutral(key, {})}
    assert neutral == set(NEUTRAL_FIELDS.split())
    assert keys - neutral == set(NAMING_FIELDS.split())
    of_methods = {f.name for cls in (*all_classes(), SelectionConfig) for f in fields(cls)}
    assert not [key for key in of_methods if is_neutral(key, {})]
    best = {key for key in keys if is_neutral(key, {}) and not is_neutral(key, {"load_best_model_at_end": True})}
    assert best == {"save_steps", "save_strategy", "eval_steps", "eval_delay", "eval_on_start"}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau"}  # each evaluation may lower the learning rate
    assert best == {key for key in keys if is_neutral(key, {}) and not is_neutral(key, plateau)}


def test_numbers_and_text_of_yaml_survive_a_round_trip(tmp_path):
    integers = "f: [0256, 4:16, 0o17, 0x1F, -07, 0b1], g: ['0o17', '0256', '4:16', '12']"
    text = write(tmp_path / "a.yaml", f"x: {{a: 1e-4, b: [1E5, .5, 3], c: no, d: 2024-01-01, e: '1e-4', {integers}}}")
    values = read_yaml(text)["x"]
    assert (values.pop("f"), values["g"]) == ([256, "4:16", 15, 31, -7, "0b1"], ["0o17", "0256", "4:16", "12"])
    assert values | {"g": 0} == {"a": 1e-4, "b": [1e5, 0.5, 3], "c": "no", "d": "2024-01-01", "e": "1e-4", "g": 0}
    assert read_yaml(write(tmp_path / "b.yaml", to_yaml(values))) == values


def test_a_mistyped_target_of_make_is_answered_with_the_nearest():
    def make(*words):
        return subprocess.run(["make", *words], capture_output=True, text=True, check=False).stderr

    assert "no target sft-htf, did you mean sft-hft?" in make("sft-htf")
    assert "MODEL=llama3 is not among the recipes: " in make("-n", "sft-hft", "MODEL=llama3")


def test_accumulation_follows_from_the_global_batch():
    values = {"global_batch_size": 32, "per_device_train_batch_size": 4}
    assert accumulation_steps(values, 8, 1) == {"gradient_accumulation_steps": 8}
    assert accumulation_steps(values, 8, 2) == {"gradient_accumulation_steps": 4}
    for wrong in ({"global_batch_size": 36}, {"global_batch_size": 4}):
        with pytest.raises(HFTError, match="is not a multiple of 4 rows per device x 2 processes"):
            accumulation_steps(values | wrong, 8, 2)
    with pytest.raises(HFTError, match="to give it, set that to none"):
        accumulation_steps(values | {"gradient_accumulation_steps": 2}, 8, 2)


def test_a_7b_without_a_gpu_is_refused_before_anything_is_fetched(capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["sft", "--config", "recipes/llama2-7b/sft.yaml", "recipes/methods/hft.yaml"]) == 2
    err = capsys.readouterr().err
    assert "6.7B parameters need a GPU" in err
    assert "7.3 GiB each on 8" in err


def test_null_is_the_default_of_a_folder_and_of_a_name(tiny, tmp_path):
    file = write(tmp_path / "more.yaml", f"output_dir: ~\nrun_name: null\nmodel_name_or_path: {tiny}")
    values = parse_config("sft", ["--config", "recipes/tiny/sft.yaml", file]).values
    assert (values["output_dir"], values["run_name"]) == ("runs/tiny-sft-hft-more", "tiny-sft-hft-more")


def test_a_later_method_file_replaces_all_of_an_earlier_one(tiny):
    files = [f"recipes/{name}.yaml" for name in ("tiny/sft", "methods/mofo", "methods/lisa", "methods/hft")]
    config = load_config("sft", *files, model_name_or_path=str(tiny), round=2)
    assert (config.run.method, config.method.selection.policy, config.method.selection.round) == ("hft", "category", 2)
    assert not {"update", "top_fraction", "schedule", "switch_every"} & config.values.keys()
    assert config.values["learning_rate"] == 1e-3  # the recipe's


def test_a_saved_config_can_be_given_another_method(tiny, tmp_path):
    lisa = load_config("sft", "recipes/tiny/sft.yaml", "recipes/methods/lisa.yaml", model_name_or_path=str(tiny))
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(lisa.values))
    badam = load_config("sft", saved, "recipes/methods/badam.yaml")
    assert badam.method.schedule.name == "badam"
    assert "active_layers" not in badam.values
    with pytest.raises(HFTError, match="active_layers is a key of schedule lisa"):
        load_config("sft", saved, "recipes/methods/fft.yaml", active_layers=3)
    own = {"schedule": "docs/examples/gradual_unfreezing.py:GradualUnfreezing", "switch_every": 3}
    saved.write_text(
        to_yaml(load_config("sft", "recipes/tiny/sft.yaml", model_name_or_path=str(tiny), policy="all", **own).values)
    )
    assert "switch_every" not in load_config("sft", saved, "recipes/methods/hft.yaml").values


def test_another_base_is_another_round(tiny, tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(f"model_name_or_path: {tiny}\ndataset_name: x\nround: 2\n")
    assert parse_config("sft", ["--config", str(saved)]).method.selection.round == 2
    words = ["--config", str(saved), "--model_name_or_path", str(tiny)]
    assert parse_config("sft", words).method.selection.round == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: expected a number greater than 0"),
        (["--method", "fft"], "a method is a file, not a flag: --config RECIPE fft"),
        (["--accelerator_config", "none.json"], "No such file"),
        (["--policy_options", "{a: [1}"], "policy_options is not valid YAML: "),
        (["--fraction", "0.25", "--policy", "all"], "fraction means nothing to the all policy"),
    ],
)
def test_other_mistakes_are_one_sentence_too(capsys, words, message, tiny):
    assert main(["sft", "--config", "recipes/tiny/sft.yaml", "--model_name_or_path", str(tiny), *words]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.count("\n") == 0


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_every_command_has_its_own_help(capsys, words):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"usage: hft {words[0]}" in text or words == ["--help"]
    if words[0] == "sft":
        assert "--mixout_p" in text
        assert "--assistant_only_loss  true or false" in text
        assert text.index("--mixout_p") < text.index("TRL and transformers:") < text.index("--packing_strategy  'bfd'")
