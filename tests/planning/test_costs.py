"""FLOPs and saved bytes against real models that take a real step, and against published counts."""

import time
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.modeling_utils import local_torch_dtype
from trl.trainer.utils import add_fused_lm_head

from hft.errors import HFTError
from hft.freezing import autocast_experts, freeze, is_wide
from hft.model.anatomy import anatomy_of, architecture_of, layers_of, meta_model
from hft.model.load import read_config
from hft.parts import parts_of, split
from hft.planning.costs import costs_of, fewest_checkpointed_layers
from hft.planning.counting import BFLOAT16, FLOAT32, MIXED
from hft.selection import Selection, SelectionConfig, select
from hft.selection.policies import build_selection
from tests.model.test_architectures import FAMILIES, config_of

GIB = 2**30


class BottomHalf(Selection):
    """The upper half of the layers, the last norm and the head train; the input embeddings are frozen too."""

    @property
    def frozen_parameters(self):
        return [*super().frozen_parameters, next(iter(self.anatomy.embeddings))]

    @property
    def trained_parameters(self):
        return [name for name in super().trained_parameters if name not in self.frozen_parameters]


def bottom_half(anatomy):
    freeze = [unit.name for unit in anatomy.units if unit.layer < anatomy.num_layers // 2]
    selection = select(anatomy, SelectionConfig(policy="explicit", freeze=freeze))
    return BottomHalf(anatomy, selection.config, selection.trained_units)


def core(anatomy):
    """As the core policy does: half of each matrix's columns, in all layers but the first, whose units are frozen."""
    columns = {n: s for n, s in anatomy.shapes.items() if len(s) > 1 and ".0." not in n}
    masks = {n: (torch.arange(s[-1]) % 2 == 0).view(*[1] * (len(s) - 1), -1) for n, s in columns.items()}
    units = [unit for unit in anatomy.units if unit.layer]
    return build_selection(anatomy, SelectionConfig(policy="explicit", freeze=["*.0.*"]), (units, masks))


def chosen(**keys):
    return lambda anatomy: select(anatomy, SelectionConfig(**keys))


SELECTIONS = {
    "all": chosen(policy="all"),
    "category": chosen(),
    "category-freeze-io": chosen(freeze_embeddings=True),
    "layer": chosen(policy="layer"),
    "layer-freeze-io": chosen(policy="layer", freeze_embeddings=True),
    "model": chosen(policy="model"),
    "core": core,
    "bottom-half": bottom_half,
    "nothing-but-norms": chosen(policy="category", fraction=0.0, norm_fraction=1.0, freeze_embeddings=True),
}


def flash(q, k, v, *args, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


# Products that torch (2.13) has no formula for. TRL's head adds to its gradients in place.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *qkv, **kw: 2 * flash(*qkv),
    torch.ops.aten.addmm_: lambda out, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._grouped_mm: lambda a, b, *args, **kwargs: 2 * a[-2] * a[-1] * b[-1],
}


def real_model(config, selection, precision, attention, checkpointed):
    """The frozen model in the dtypes of a run."""
    torch.manual_seed(0)
    with local_torch_dtype(precision.frozen):
        model = architecture_of(config)(config)
    if attention:
        model.set_attn_implementation(attention)
    freeze(model, selection)
    if precision.autocast:
        autocast_experts(model)
    split(model, selection.frozen_masks)
    wide = [p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()]
    wide += [part.original0 for name, part in parts_of(model).items() if is_wide(name, part.original0.ndim)]
    for parameter in [*wide, *(p for p in model.parameters() if p.requires_grad)]:
        parameter.data = parameter.data.to(precision.trained)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(layers_of(model)[1]):
            layer.gradient_checkpointing = index in checkpointed
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def measured(config, selection, rows, length, *, precision, checkpointed=(), attention=None, padded=False):
    """FLOPs of both passes of a real step on the CPU, and bytes that autograd holds between them."""
    model = real_model(config, selection, precision, attention, checkpointed)
    ids = torch.randint(3, 100, (rows, length))
    mask = torch.ones_like(ids)
    mask[-1, length - padded :] = 0
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = []

    def pack(tensor):
        def unpack():
            return tensor

        held.append(weakref.ref(unpack))
        return unpack

    forward, backward = (FlopCounterMode(display=False, custom_mapping=FORMULAS) for _ in range(2))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast)
    with forward, saved_tensors_hooks(pack, lambda unpack: unpack()), autocast:
        kwargs = {"attention_mask": mask, "use_cache": False}
        loss = -model(input_ids=ids, labels=ids, fused_lm_head=True, **kwargs).log_probs.sum()
    storages = [unpack().untyped_storage() for ref in held if (unpack := ref())]
    with backward:
        loss.backward()
    saved = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    return forward.get_total_flops(), backward.get_total_flops(), sum(saved.values())


def assert_counted(family, selection, *, rows=3, length=20, **how):
    config = config_of(family)
    config.attn_pdrop = 0.0  # GPT-2's: the CPU has no kernel with dropout
    selected = SELECTIONS[selection](anatomy_of(meta_model(config)))
    costs = costs_of(config, selected, rows, length, **how)
    forward, backward, saved = measured(config, selected, rows, length, **how)
    assert costs.forward == forward
    assert costs.backward + costs.recompute == backward
    assert costs.saved + costs.saved_copies == pytest.approx(saved, rel=0.001)


FAST = [
    ("llama", "category", {"precision": MIXED}),
    ("llama", "core", {"precision": MIXED, "padded": True, "checkpointed": (0, 2)}),
    ("llama", "bottom-half", {"precision": BFLOAT16}),
    ("llama", "nothing-but-norms", {"precision": MIXED, "attention": "eager", "checkpointed": (3,)}),
    ("qwen2", "layer-freeze-io", {"precision": MIXED, "checkpointed": (0, 1, 2, 3)}),
    ("gemma2", "model", {"precision": MIXED, "padded": True}),
    ("gemma3_text", "category", {"precision": MIXED}),  # whose layers differ in what they see
    ("olmo2", "category", {"precision": MIXED}),
    ("gpt2", "category", {"precision": BFLOAT16, "padded": True, "checkpointed": (1,)}),
    ("phi3", "all", {"precision": MIXED}),
    ("falcon-heads", "category-freeze-io", {"precision": FLOAT32}),
    ("bloom", "layer", {"precision": BFLOAT16, "padded": True}),
    ("mixtral", "category", {"precision": MIXED, "checkpointed": (0,)}),
    ("deepseek_v3", "category", {"precision": MIXED}),  # whose first layer has no experts
    ("gpt_oss", "category", {"precision": MIXED, "padded": True}),
]


@pytest.mark.parametrize(
    ("family", "selection", "how"), FAST, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_step_costs_what_a_real_one_takes(family, selection, how):
    assert_counted(family, selection, **how)


# On a CPU a LayerNorm that is frozen in bf16 cannot take fp32. Neither Llama 4 under TRL's head nor a thinker can run.
NOT_MIXED = ("stablelm", "starcoder2", "phi", "gptj", "opt", "gpt2", "mpt", "gpt_neox", "bloom", "persimmon", "falcon")
NOT_MIXED += ("falcon-groups", "falcon-heads", "gpt_bigcode", "gpt_bigcode-heads", "codegen", "phimoe", "openai-gpt")
NOT_REAL = ("llama4_text", "qwen3_omni_moe_thinker")
WAYS = [(precision, layers) for precision in (BFLOAT16, FLOAT32, MIXED) for layers in ((), (0, 2), (0, 1, 2, 3))]
CASES = [
    (family, list(SELECTIONS)[index % len(SELECTIONS)], *way)
    for number, family in enumerate(f for f in FAMILIES if f not in NOT_REAL)
    for index, way in enumerate(WAYS[: 6 if family in NOT_MIXED else 9], number)
    if family != "openai-gpt" or not way[1]  # which cannot checkpoint
]
CASES += [("llama", selection, *way) for selection in SELECTIONS for way in WAYS]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "selection", "precision", "checkpointed"), CASES)
def test_a_step_of_every_family_in_every_way(family, selection, precision, checkpointed):
    padded = len(selection) % 2 == 0
    assert_counted(family, selection, precision=precision, checkpointed=checkpointed, padded=padded)


@pytest.mark.parametrize("family", NOT_REAL)
def test_what_cannot_run_here_is_counted_too(family):
    config = config_of(family)
    costs = costs_of(config, SELECTIONS["category"](anatomy_of(meta_model(config))), 2, 16)
    assert costs.forward < costs.backward + costs.recompute
    assert costs.saved > 0


def test_attention_with_values_narrower_than_queries_keeps_no_square():
    """DeepSeek's: the CPU has no kernel for it, and GPUs have."""
    narrow, wide = config_of("deepseek_v3"), config_of("deepseek_v3")
    narrow.v_head_dim = 4
    saved = [costs_of(c, SELECTIONS["all"](anatomy_of(meta_model(c))), 1, 256).saved for c in (narrow, wide)]
    assert saved[0] < saved[1]


def test_a_flash_kernel_has_no_mask():
    config = config_of("gemma3_text")  # whose window is 8 tokens
    selection = SELECTIONS["all"](anatomy_of(meta_model(config)))
    masked, flash = (costs_of(config, selection, 2, 32, attention=name) for name in ("sdpa", "flash_attention_2"))
    assert flash.forward == masked.forward
    assert flash.saved < masked.saved


def config_from(name, layers):
    config = read_config(name, f"recipes/{name}")
    config.num_hidden_layers = layers
    return config


def published(selection, checkpointed=(), *, name="llama2-7b", layers=32, length=2048):
    """Costs as they were published: bf16 throughout, all logits at once, and a mask although nothing is padded."""
    config = config_from(name, layers)
    how = {"checkpointed": checkpointed, "precision": BFLOAT16, "padded": True, "fused_head": False}
    return costs_of(config, SELECTIONS[selection](anatomy_of(meta_model(config))), 1, length, **how)


def test_the_published_ratios_hold():
    """One sequence of 2,048 tokens, FlopCounterMode on eager attention: README, "Why is it not faster?"."""
    every, fft = range(32), published("all")
    full = published("all", every)
    assert full.flops / fft.flops == pytest.approx(1.2599, abs=1e-4)
    assert published("category").flops / fft.flops == pytest.approx(0.8489, abs=1e-4)
    assert published("layer").flops / fft.flops == pytest.approx(0.8489, abs=1e-4)
    assert published("category", every).flops / full.flops == pytest.approx(0.880, abs=5e-4)
    assert published("category").flops / full.flops == pytest.approx(0.674, abs=5e-4)
    assert published("bottom-half").flops / fft.flops == pytest.approx(0.6728, abs=1e-4)
    of_llama3 = {"name": "llama3-8b"}
    full = published("all", every, **of_llama3)
    assert published("category", **of_llama3).flops / full.flops == pytest.approx(0.693, abs=2e-3)


def test_the_published_activations_hold():
    """GiB that autograd holds for one sequence of 2,048 tokens of Llama-2-7B, sdpa."""
    counted = {("all", ()): 11.68, ("category", ()): 10.32, ("layer", ()): 10.01, ("bottom-half", ()): 5.83}
    counted |= {("all", tuple(range(0, 32, 2))): 6.11, ("all", tuple(range(32))): 0.55}
    for (selection, checkpointed), gib in counted.items():
        assert published(selection, checkpointed).saved / GIB == pytest.approx(gib, rel=0.03)


def test_checkpointing_lets_the_gradient_flow_below_what_trains():
    """transformers asks for the embeddings' gradient, so that a frozen lower half costs a backward pass after all."""
    assert published("bottom-half", (31,)).backward > 1.2 * published("bottom-half").backward


def test_a_70b_is_counted_in_seconds():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    selection = select(anatomy_of(meta_model(config)), SelectionConfig())
    start = time.process_time()
    costs_of(config, selection, 4, 4096)
    once = time.process_time() - start
    fewest_checkpointed_layers(lambda layers: costs_of(config, selection, 4, 4096, checkpointed=layers), 80, 0)
    assert time.process_time() - start < 20 * once  # 81 numbers of layers from a few counts


def test_the_fewest_checkpointed_layers_that_fit():
    config = config_from("llama2-7b", 8)
    selection = select(anatomy_of(meta_model(config)), SelectionConfig())

    def costs(checkpointed):
        return costs_of(config, selection, 2, 1024, checkpointed=checkpointed)

    for layers in (0, 3, 8):
        assert fewest_checkpointed_layers(costs, 8, costs(range(layers)).peak) == layers
    assert fewest_checkpointed_layers(costs, 8, costs(range(8)).peak - 1) is None


def test_a_plan_of_llama2_7b():
    """Half of Llama-2-7B on one GPU, 4 rows of 4,096 tokens, all layers checkpointed: as `hft plan` has it."""
    config = config_from("llama2-7b", 32)
    costs = costs_of(
        config, SELECTIONS["category"](anatomy_of(meta_model(config))), 4, 4096, checkpointed=range(32), padded=True
    )
    per_token = [flops / costs.tokens / 1e9 for flops in (costs.forward, costs.backward, costs.recompute)]
    assert per_token == pytest.approx([15.36, 24.25, 12.48], abs=0.005)
    assert (costs.saved / GIB, costs.transient / GIB) == pytest.approx((8.75, 6.55), abs=0.005)


def test_what_depends_on_weights_is_refused_in_a_sentence():
    config = config_of("mixtral")
    config._experts_implementation = "eager"
    with pytest.raises(HFTError, match="model type mixtral are not known: what it computes depends on its weights"):
        costs_of(config, SELECTIONS["category"](anatomy_of(meta_model(config))), 1, 8)
