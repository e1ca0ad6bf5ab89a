"""Adapters as methods (paper Table 5): their config, and what they add to a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import (
    AdaLoraConfig,
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from peft.utils import CONFIG_NAME
from transformers import PretrainedConfig

from hft.errors import HFTError
from hft.methods.schedule import ScheduleConfig
from hft.model.anatomy import anatomy_of, meta_model
from hft.selection import Selection, SelectionConfig

_LORA = {"rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules"}
# Of each adapter PEFT's config class, and our keys that it takes with PEFT's names for them.
ADAPTERS: dict[str, tuple[type[PeftConfig], dict[str, str]]] = {
    "lora": (LoraConfig, _LORA),
    "qlora": (LoraConfig, _LORA),
    "adalora": (
        AdaLoraConfig,
        _LORA | {"rank": "target_r", "start_rank": "init_r", "orthogonality_weight": "orth_reg_weight"},
    ),
    "p-tuning": (
        PromptEncoderConfig,
        {"num_virtual_tokens": "num_virtual_tokens", "encoder_hidden_size": "encoder_hidden_size"},
    ),
    "p-tuning-v2": (PrefixTuningConfig, {"num_virtual_tokens": "num_virtual_tokens"}),
    "osf": (OSFConfig, {"preserved_fraction": "effective_rank", "target_modules": "target_modules"}),
}
PROMPT_LEARNING = ("p-tuning", "p-tuning-v2")
# Keys of AdaLoRA's schedule, which PEFT takes in steps; the trainer turns them into steps once it knows how many.
SCHEDULE = ("pruning_from", "pruning_until")
# Bytes a scalar in nf4 with double quantization: 4 bits, and 8 bits a block of 64 with fp32 for 256 blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class AdapterConfig:
    """Which adapter trains instead of the model's own weights; a key that is left out has PEFT's default."""

    adapter: Literal["lora", "qlora", "adalora", "p-tuning", "p-tuning-v2", "osf"] | None = field(
        default=None, metadata={"help": "Train this adapter; the model itself is frozen whole."}
    )
    rank: int | None = field(default=None, metadata={"help": "Rank of LoRA; the mean rank that AdaLoRA ends with."})
    start_rank: int | None = field(default=None, metadata={"help": "Rank that AdaLoRA starts with."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The update is scaled by lora_alpha / rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapter."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules with an adapter: kinds such as q_proj v_proj, or all-linear."}
    )
    orthogonality_weight: float | None = field(
        default=None, metadata={"help": "Weight of AdaLoRA's orthogonality loss."}
    )
    pruning_from: float | None = field(
        default=None, metadata={"help": "Fraction of the steps after which AdaLoRA begins to prune ranks."}
    )
    pruning_until: float | None = field(
        default=None, metadata={"help": "Fraction of the steps after which AdaLoRA's ranks are final."}
    )
    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Length of the prompt or prefix."})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "Width of P-tuning's prompt encoder."})
    preserved_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of each matrix's singular directions, the largest, that OSF keeps."}
    )
    learning_rate_factor: float = field(
        default=1.0,
        metadata={"help": "The method's learning rate as a multiple of the recipe's; --learning_rate wins over both."},
    )

    def __post_init__(self):
        if self.target_modules == ["all-linear"]:
            self.target_modules = "all-linear"  # as a YAML has it
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and f.name not in _COMMON]
        if self.adapter is None:
            if given or self.learning_rate_factor != 1.0:
                key = [*given, "learning_rate_factor"][0]
                raise HFTError(f"{key} belongs to an adapter; give recipes/methods/lora.yaml or another of them")
            return
        known = [*ADAPTERS[self.adapter][1], *(SCHEDULE if self.adapter == "adalora" else ())]
        if wrong := [key for key in given if key not in known]:
            raise HFTError(f"{wrong[0]} is no key of adapter {self.adapter!r}, whose keys are {', '.join(known)}")
        if self.adapter == "adalora":
            if None in (self.rank, self.start_rank, self.pruning_from, self.pruning_until):
                raise HFTError("adalora needs rank, start_rank, pruning_from and pruning_until")
            if not (0 <= self.pruning_from < self.pruning_until <= 1 and 0 < self.rank < self.start_rank):
                raise HFTError("adalora needs 0 <= pruning_from < pruning_until <= 1 and rank below start_rank")

    def peft_config(self) -> PeftConfig:
        """PEFT's config of this adapter.

        Raises:
            HFTError: PEFT refuses a value.
        """
        cls, names = ADAPTERS[self.adapter]
        given = {theirs: getattr(self, ours) for ours, theirs in names.items() if getattr(self, ours) is not None}
        if self.adapter == "adalora":
            given["total_step"] = 2**62  # until the trainer knows it
        try:
            return cls(task_type="CAUSAL_LM", **given)
        except (ValueError, TypeError) as error:
            raise HFTError(f"{self.adapter}: {' '.join(str(error).split())}") from error


_COMMON = ("adapter", "learning_rate_factor")


@dataclass(frozen=True, kw_only=True)
class AdapterSelection(Selection):
    """The selection of an adapter run: no unit trains, only what the adapter adds.

    Attributes:
        config: an `AdapterConfig`.
        added: scalars of each of the adapter's trained parameters, by its name in the model that has the adapter.
        held: scalars that the adapter holds without training them, in the base's dtype: OSF's factors as they were.
    """

    added: dict[str, int]
    held: int

    @property
    def frozen_parameters(self) -> list[str]:
        anatomy = self.anatomy
        units = [name for unit in anatomy.units for name in unit.parameters]
        return [*dict.fromkeys(units), *anatomy.embeddings, *anatomy.others, *anatomy.towers]

    @property
    def trained_parameters(self) -> list[str]:
        return list(self.added)

    @property
    def num_trained(self) -> int:
        return sum(self.added.values())

    @property
    def num_with_optimizer_state(self) -> int:
        return self.num_trained

    def base_bytes(self, scalar: int) -> float:
        """Bytes of all that is frozen, with that many a scalar where it is not quantized."""
        matrices = sum(unit.numel for unit in self.anatomy.units if unit.block != "norm")
        quantized = matrices if self.config.adapter == "qlora" else 0
        return quantized * NF4_BYTES + (self.anatomy.numel - quantized + self.held) * scalar

    def summary(self) -> str:
        """What trains, in words."""
        given = {k: v for k, v in asdict(self.config).items() if v is not None and k not in _COMMON}
        settings = ", ".join(f"{key} {value}" for key, value in given.items())
        return (
            f"adapter {self.config.adapter}: {settings}; the model is frozen whole\n"
            f"{self.num_trained:,} scalars train, {self.fraction_of_model:.2%} of the model's {self.anatomy.numel:,}"
        )


def adapter_selection(model_config: PretrainedConfig, config: AdapterConfig) -> AdapterSelection:
    """Put the adapter on a model without storage, and count.

    Raises:
        HFTError: the adapter does not fit the model.
    """
    model = meta_model(model_config)
    anatomy = anatomy_of(model)
    try:
        model = get_peft_model(model, config.peft_config())
    except (ValueError, TypeError) as error:
        raise HFTError(f"{config.adapter}: {' '.join(str(error).split())}") from error
    freeze_ranknum(model)
    return AdapterSelection(
        anatomy=anatomy,
        config=config,
        trained=frozenset(),
        added={name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
        held=sum(buffer.numel() for name, buffer in model.named_buffers() if "osf" in name),
    )


def freeze_ranknum(model: PeftModel) -> None:
    """Freeze the number that AdaLoRA divides by: PEFT (0.21) lets it train, yet neither saves nor restores it."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def check_keys(config: dict[str, Any]) -> None:
    """Refuse keys that do not go with an adapter, and an adapter as the base.

    Raises:
        HFTError: the base is an adapter itself, or keys of a selection stand beside an adapter.
    """
    base = Path(config["model_name_or_path"])
    if (base / CONFIG_NAME).exists():
        raise HFTError(
            f"{base} is an adapter, not a model; `hft merge --method adapter --models {base} --out NEW` makes one of it"
        )
    others = (f.name for cls in (SelectionConfig, ScheduleConfig) for f in fields(cls))
    if config.get("adapter") and (both := [name for name in (*others, "update") if name in config]):
        raise HFTError(
            f"{both[0]} is about weights of the model, and adapter {config['adapter']!r} freezes it whole; remove one"
        )
