"""The config of one run: recipe, method and flags as one typed value, with its name and folder."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hft.config import TURNS, Given, Keys, RunConfig, fill, read_arguments, read_files, read_yaml, renamed
from hft.errors import HFTError, read_text
from hft.methods import Method, all_classes, classes_of, method_of, owners_of
from hft.model.weights import check_whole
from hft.objectives import OBJECTIVES, Objective, find_objective
from hft.record.manifest import absolute_or_hub_id, rounds_so_far
from hft.selection import SelectionConfig

# What our commands set differently from TRL; a recipe or a flag still wins.
DEFAULTS = {
    "report_to": "wandb",
    "resume_from_checkpoint": "auto",  # rerunning a command resumes a killed run
    "include_num_input_tokens_seen": "non_padding",  # so that Trainer logs tokens per second
}
# Keys that say where and how to run, what is logged and when, not what is computed: they neither name a run nor make it
# a different one. Whatever is checkpointed, a run computes the same bits.
NEUTRAL = re.compile(
    "output_dir|run_name|report_to|project|resume_from_checkpoint|dry_run|use_cpu|bf16|architecture|local_rank|debug|"
    "(activation|gradient)_checkpointing(_kwargs|_layers)?|dataset_num_proc|torch_empty_cache_steps|disable_tqdm|do_.*|"
    "(hub|push|logging|log|trackio|ddp)_.*|dataloader_(?!drop_last).*|save_(?!only_trained).*|enable_jit_checkpoint|"
    "eval_(steps|delay|on_start|accumulation_steps|do_concat_batches|use_gather_object)|batch_eval_metrics|"
    "include_for_metrics|include_num_input_tokens_seen|prediction_loss_only|skip_memory_metrics|(bf|fp)16_full_eval"
)
# Those of them that say what `load_best_model_at_end` chooses among, and what lowers the rate on a plateau.
OF_BEST = re.compile("(save|eval)_(steps|strategy|delay|on_start)")
TEMPLATES = Path(__file__).parents[1] / "demo" / "templates"


@dataclass(frozen=True)
class Config:
    """A resolved config.

    Attributes:
        objective: what it trains on.
        values: every key that was given or has a default of hft's, typed; the content of `config.yaml`.
        run: model, data, batch and names.
        method: how parameters change.
    """

    objective: Objective
    values: dict[str, Any]
    run: RunConfig
    method: Method

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit of the base on the Hub: of its weights, config and tokenizer alike."""
        return (self.values.get("model_init_kwargs") or {}).get("revision")

    @property
    def base(self) -> str:
        """What identifies the base: an absolute path, or a Hub id with its revision."""
        name = absolute_or_hub_id(self.run.model_name_or_path)
        return f"{name}@{self.revision}" if self.revision and not Path(name).is_dir() else name

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.values["output_dir"])


def load_config(objective: str, *files: str | Path, **flags: Any) -> Config:
    """The config of a run from YAML files and keys; later files win, then the keys.

    Raises:
        HFTError: an unknown key, a value of the wrong type, keys that exclude each other, or an unreadable file.
    """
    return resolve_config(objective, read_files(files, flags))


def parse_config(objective: str, arguments: Sequence[str]) -> Config:
    """The config of a run from a command line: `--config RECIPE.yaml [METHOD.yaml ...] [--key value ...]`."""
    return resolve_config(objective, read_command_line(objective, arguments))


def read_command_line(objective: str, arguments: Sequence[str], **more: tuple[type, ...]) -> Given:
    """The files and flags of a command line; `more` are further keys, by the command that takes them."""
    description = f"Train with {objective.upper()}: a recipe, a method, and flags."
    theirs = {"TRL and transformers": (find_objective(name).config for name in [objective])}  # imported last
    return read_arguments(arguments, " ".join(["hft", *more, objective]), description, more | groups_of_keys() | theirs)


def groups_of_keys() -> dict[str, tuple[type, ...]]:
    methods = {f"{cls.kind} {cls.name}: {cls.description()}": (cls,) for cls in all_classes()}
    return {"run": (RunConfig,), "selection": (SelectionConfig,), **methods}


def resolve_config(objective: str, given: Given) -> Config:
    """Type and check all keys, and complete them with defaults, round, name and folder."""
    values, flags = given.resolve(keys_for(objective, given))
    if not values.get("model_name_or_path") or not values.get("dataset_name"):
        raise HFTError("model_name_or_path and dataset_name are needed: give a recipe with --config, or both as flags")
    if isinstance(text := values.get("model_init_kwargs"), str):  # as TRL's types allow
        raise HFTError(f"model_init_kwargs: expected a mapping, got {text!r}")
    values = DEFAULTS | values
    if "model_name_or_path" in flags:  # in a file these two are about the file's model
        values = {key: value for key, value in values.items() if key not in ("architecture", "round") or key in flags}
    if "learning_rate" in flags and "learning_rate_factor" in values and "learning_rate_factor" not in flags:
        values["learning_rate_factor"] = 1.0
    check_is_a_model(values["model_name_or_path"])
    method = method_of(values)
    if not method.adapter and (rounds := rounds_so_far(values["model_name_or_path"])):
        values = {"round": rounds[-1]["selection"]["round"] + 1} | values
        method = method_of(values)
    values["run_name"] = run_name(objective, values, flags, given)
    values = {"output_dir": f"runs/{values['run_name']}", **values}
    run = fill(RunConfig, values)
    kept = {key: value for key, value in values.items() if key != "dry_run"}
    return Config(find_objective(objective), kept, run, method)


def keys_for(objective: str, given: Given) -> Keys:
    """The keys of an objective's config, with those of the methods that are named in the end."""
    methods = classes_of(given.merge(replaced_keys)[0])
    own = (RunConfig, SelectionConfig, *methods, find_objective(objective).config)

    def explain(key: str) -> str | None:
        if owners := owners_of(key):
            return f"{key} is a key of {owners}; remove it, or give that method"
        others = [other for other in OBJECTIVES if key in {f.name for f in fields(find_objective(other).config)}]
        return f"{key!r} is a key of {others[0]}, not of {objective}" if others else None

    return Keys(own, explain, replaced_keys)


def replaced_keys(config: Mapping[str, Any]) -> set[str]:
    """The keys that a method's file resets: all of the selection, and of every method but strategies."""
    methods = [cls for cls in (*all_classes(), *classes_of(config)) if cls.kind != "strategy"]
    names = {f.name for cls in (SelectionConfig, *methods) for f in fields(cls)} | {cls.kind for cls in methods}
    return (names | {"method"}) - {"selection_seed", "round"}


def run_name(objective: str, values: dict[str, Any], flags: dict[str, Any], given: Given) -> str:
    """The name of a run: that of the output folder if one is given, else recipe, objective, method, files and flags."""
    if "output_dir" in flags and "run_name" not in flags:
        return Path(flags["output_dir"]).name
    if "run_name" in values:
        return values["run_name"]
    others = list(zip(given.files, given.contents, strict=True))[1:]
    more = [Path(path).stem for path, content in others if "method" not in content]
    return name_of(values, flags, given.files, objective, values.get("method") or "hft", *more)


def name_of(values: dict[str, Any], flags: dict[str, Any], files: Sequence[str], *words: str) -> str:
    """The recipe's folder, or else the base, then some words, then each flag that makes the run a different one."""
    source = Path(files[0]).resolve().parent.name if files else Path(values["model_name_or_path"]).name
    name = "-".join([source, *words])
    for key, value in flags.items():
        if not is_neutral(key, values):
            name += f"-from-{_slug(value)}" if key == "model_name_or_path" else f"-{key}={_slug(value)}"
    # Most file systems stop at 255 bytes.
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:9]}"


def is_neutral(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key leaves a run with these values the same one."""
    acted_on = values.get("load_best_model_at_end") or values.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    return bool(NEUTRAL.fullmatch(key) and not (acted_on and OF_BEST.fullmatch(key)))


def _slug(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_slug, value))
    return re.sub(r"[^A-Za-z0-9._+-]", "_", str(value).rstrip("/").rpartition("/")[2])


def check_is_a_model(name: str, folder: Path | None = None) -> None:
    """Refuse an adapter's folder as a model, and what a run with `save_only_trained` has saved."""
    check_whole(folder := folder or Path(name), name)
    if (folder / "adapter_config.json").exists():
        remedy = f"`hft merge --method adapter --models {name} --out NEW` makes it one"
        raise HFTError(f"{name} is an adapter, not a model; {remedy}")


def check_shared(values: Mapping[str, Any]) -> None:
    """Refuse keys that cannot hold for each of several runs, of a sequence or of `hft cpi`."""
    if values.get("save_only_trained"):
        raise HFTError("each run starts from the models of those before; remove save_only_trained")
    if named := [key for key in ("push_to_hub", "hub_model_id") if values.get(key)]:
        raise HFTError(f"{named[0]} would push every run; remove it, and push the one that you want")
    if (start := values.get("resume_from_checkpoint")) not in (None, "auto", "none", "true", "false"):
        raise HFTError(f"resume_from_checkpoint {start} is one run's; remove it: each resumes from its own")


def find_template(name: str) -> str:
    """The path of a chat template, a file or one that comes with hft; empty if none is given."""
    found = [path for path in (Path(name), TEMPLATES / Path(name).name) if path.is_file()]
    if name and not found:
        known = ", ".join(sorted(path.name for path in TEMPLATES.glob("*.jinja")))
        raise HFTError(f"chat template {name} is not a file; give a .jinja file, or one that comes with hft: {known}")
    return str(found[0]) if found else ""


def read_saved_config(path: Path) -> dict[str, Any]:
    """The values that a run saved, under the names that transformers has for its keys now."""
    return renamed(read_yaml(path))


def card_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config is in its model card: what makes it this run, wherever it ran."""
    return {key: value for key, value in config.items() if not is_neutral(key, config)}


def comparable(values: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs' settings different: no neutral keys, and a template by its text instead of its path."""
    # Whether text becomes turns is part of what identifies the data.
    settings = {key: value for key, value in card_settings(values).items() if value not in (None, TURNS.get(key))}
    template = find_template(settings.get("chat_template_path", ""))
    return settings | ({"chat_template_path": read_text(template)} if Path(template).is_file() else {})
