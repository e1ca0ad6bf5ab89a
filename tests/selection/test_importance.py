import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.errors import HFTError
from hft.model.anatomy import anatomy_of
from hft.selection import SelectionConfig, select
from hft.selection.importance import (
    REDUCTIONS,
    fisher,
    importance_scores,
    input_norms,
    select_by_importance,
    token_ids,
)
from tests.conftest import error_of, tensors
from tests.model.test_architectures import small

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def masks(model, batches=(), *, score, granularity="column", **settings):
    """Which columns or elements train, by matrix."""
    config = SelectionConfig(policy="importance", score=score, granularity=granularity, **settings)
    selection = select_by_importance(model, anatomy_of(model), config, batches)
    return {name: mask.tensor() for name, mask in selection.trained_masks.items()}


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def batches(tokenizer, rows):
    return list(token_ids(tokenizer, rows, max_length=40, count=5))


@pytest.fixture
def matrices(model):
    """The matrices of the layers, found without the anatomy."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def inputs_of(model, batches, names):
    """All rows that each linear layer is applied to, on all samples, (tokens, in)."""
    seen = {name: [] for name in names}
    modules = {model.get_submodule(name.removesuffix(".weight")): rows for name, rows in seen.items()}
    handles = [m.register_forward_hook(lambda m, args, out: modules[m].append(args[0].detach()[0])) for m in modules]
    with torch.no_grad():
        for batch in batches:
            model.eval()(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def squared_gradients(model, batches, matrices):
    """The mean over samples of the squared gradient, by autograd, matrix by matrix."""
    model.eval()
    total = {name: torch.zeros_like(weight) for name, weight in matrices.items()}
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        for name, gradient in zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True):
            total[name] += gradient**2 / len(batches)
    return total


def brute_force(score, model, batches, matrices):
    if score == "fisher":
        return squared_gradients(model, batches, matrices)
    scores = {name: weight.detach().abs() for name, weight in matrices.items()}
    if score == "wanda":
        inputs = inputs_of(model, batches, matrices)
        scores = {name: s * inputs[name].norm(dim=0) for name, s in scores.items()}
    return scores


def test_input_norms_are_those_of_all_tokens(model, batches, matrices):
    norms = input_norms(model, matrices, batches)
    assert norms.keys() == matrices.keys()
    for name, inputs in inputs_of(model, batches, matrices).items():
        torch.testing.assert_close(norms[name], inputs.norm(dim=0))
    first = model.model.layers[0].input_layernorm
    embedded = torch.cat([first(model.model.embed_tokens(batch))[0] for batch in batches])
    torch.testing.assert_close(norms[Q_PROJ], embedded.norm(dim=0))


def test_fisher_squares_the_gradient_of_each_sample_by_itself(model, batches, matrices):
    expected = squared_gradients(model, batches, matrices)
    for reduction in REDUCTIONS.values():
        found = fisher(model, matrices, batches, reduction)
        for name in matrices:
            torch.testing.assert_close(found[name], reduction(expected[name]), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fisher"])
@pytest.mark.parametrize("granularity", ["column", "element"])
def test_the_masks_freeze_what_scores_highest(model, batches, matrices, score, granularity):
    scores = brute_force(score, model, batches, matrices)
    found = masks(model, batches, score=score, granularity=granularity, fraction=0.3)
    inverse = masks(model, batches, score=score, granularity=granularity, fraction=0.7, invert=True)
    assert list(found) == list(matrices)
    for name, mask in found.items():
        expected = scores[name].sum(dim=0, keepdim=True) if granularity == "column" else scores[name]
        assert mask.shape == expected.shape
        assert int(mask.sum()) == round(0.3 * mask.numel())
        lowest_frozen, highest_trained = expected[~mask].min(), expected[mask].max()
        assert lowest_frozen >= highest_trained * (1 - 1e-4)
        # What scores highest is the complement of what scores lowest, but for rounding in the scores.
        assert (mask != ~inverse[name]).float().mean() < 0.01


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fisher"])
def test_a_units_score_is_the_mean_over_its_matrix(model, batches, matrices, score):
    expected = brute_force(score, model, batches, matrices)
    found = dict(importance_scores(model, anatomy_of(model), batches, score=score, granularity="unit"))
    assert found == {name: pytest.approx(float(scores.mean()), rel=1e-4) for name, scores in expected.items()}


def test_of_equal_scores_the_first_are_frozen(model):
    with torch.no_grad():
        model.get_parameter(Q_PROJ).fill_(0.5)
    kept = {g: masks(model, score="magnitude", granularity=g) for g in ("column", "element")}
    for mask in (each[Q_PROJ].view(-1) for each in kept.values()):
        assert not mask[: len(mask) // 2].any()
        assert mask[len(mask) // 2 :].all()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_all_or_nothing_can_train(model, fraction):
    found = masks(model, score="magnitude", fraction=fraction)
    assert all(bool(mask.all()) == bool(mask.any()) == (fraction == 1) for mask in found.values())


def test_scoring_changes_no_weights_and_leaves_no_hooks(model, tiny, batches):
    for score in ("wanda", "fisher"):
        masks(model, batches, score=score)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    base = tensors(tiny)
    assert all(torch.equal(p, base[name].float()) for name, p in model.named_parameters())


def test_half_precision_is_scored_in_fp32(tiny, batches):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == torch.bfloat16
    names = [Q_PROJ]
    assert input_norms(model, names, batches)[Q_PROJ].dtype == torch.float32
    assert fisher(model, names, batches, REDUCTIONS["element"])[Q_PROJ].dtype == torch.float32


def test_rows_of_all_kinds_become_text(tokenizer):
    chat = [{"role": "user", "content": "What is a fence?"}, {"role": "assistant", "content": "A thing to lean on."}]
    given = [{"text": "A fence."}, {"text": ""}, {"messages": chat}]
    given += [{"prompt": chat[:1], "completion": chat[1:]}, "never reached"]
    text, messages, parted = (b[0].tolist() for b in token_ids(tokenizer, given, 100, count=3))
    assert text == tokenizer("A fence.")["input_ids"]
    assert messages == parted == tokenizer.apply_chat_template(chat, return_dict=False)
    [cut] = token_ids(tokenizer, given[2:3], 6, count=9)
    assert cut.tolist() == [messages[:6]]


def test_special_tokens_are_added_to_text_and_left_to_the_template_in_chats(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="X $A", special_tokens=[("X", 7)])
    given = [{"text": "A fence."}, {"messages": [{"role": "user", "content": "A fence."}]}]
    text, chat = (batch[0].tolist() for batch in token_ids(tokenizer, given, 100, count=2))
    assert text[0] == 7
    assert 7 not in chat


def test_chats_without_a_template_are_joined(tokenizer, tiny):
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    [batch] = token_ids(bare, [{"messages": [{"content": "One."}, {"content": "Two."}]}], 100, count=1)
    assert batch[0].tolist() == tokenizer("One.\n\nTwo.")["input_ids"]


def test_what_cannot_be_scored_is_refused_in_a_sentence(tmp_path, model, tokenizer, sft, capsys):
    for score in ("wanda", "fisher"):
        with pytest.raises(HFTError, match="no text to score by"):
            masks(model, score=score)
    with pytest.raises(HFTError, match="it has chosen, rejected; give text, messages"):
        list(token_ids(tokenizer, [{"chosen": [], "rejected": []}], 10, count=1))
    fused, config = small("gpt2"), SelectionConfig(policy="importance", granularity="column", score="wanda")
    with pytest.raises(HFTError, match=r"and transformer\.h\.0\.attn\.c_attn\.q_proj is not one"):
        select_by_importance(fused, anatomy_of(fused), config)
    with pytest.raises(HFTError, match="needs --importance FOLDER, which `hft importance` writes"):
        select(anatomy_of(model), config)
    assert sft(tmp_path / "out", "--policy", "importance", "--granularity", "unit", "--score", "wanda") == 2
    assert "give --importance_data" in error_of(capsys)


def test_units_that_matter_most_to_the_base_are_the_frozen_ones_of_their_pool(model):
    anatomy = anatomy_of(model)
    with torch.no_grad():
        for unit in anatomy.units:
            if unit.kind in ("k_proj", "o_proj", "up_proj"):
                model.get_parameter(f"{unit.name}.weight").mul_(10)
    settings = {"policy": "importance", "granularity": "unit", "score": "magnitude"}
    for invert in (False, True):
        selection = select_by_importance(model, anatomy, SelectionConfig(**settings, invert=invert))
        trained = {unit.kind for unit in anatomy.layer(0, "attention") if selection.trains(unit)}
        assert trained == ({"k_proj", "o_proj"} if invert else {"q_proj", "v_proj"})
        ups = [unit for unit in anatomy.units if unit.kind == "up_proj"]
        assert all(selection.trains(unit) == invert for unit in ups)
