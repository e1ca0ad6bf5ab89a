"""Frozen elements of a partly frozen parameter stay as they are, bit for bit, whatever the optimizer does."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hft.cli import main
from hft.freezing import freeze, upcast
from hft.model.anatomy import Part, anatomy_of, meta_model
from hft.model.weights import checksum
from hft.record.manifest import Manifest
from hft.record.verification import verify_tensors
from hft.selection import Mask, SelectionConfig, select
from hft.selection.masks import Masks
from tests.conftest import command, error_of, identical, losses, tensors
from tests.model.test_architectures import config_of, small


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 17), (4, 6, 1), (1,), (2, 3, 7)])
def test_a_packed_mask_unpacks_to_itself_at_a_bit_a_scalar(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = Mask.of(mask)
    assert torch.equal(packed.tensor(), mask)
    assert packed.bits.numel() == -(-mask.numel() // 8)
    assert packed.digest() == Mask.of(mask.clone()).digest()
    assert packed.digest() != Mask.of(~mask).digest()


@pytest.fixture(scope="module")
def elements(tmp_path_factory, tiny, data):
    """A run of four steps in which a random half of each matrix's elements trained."""
    out = tmp_path_factory.mktemp("elements") / "out"
    assert main(command("sft", out, "--weight_decay", "0.1", method="random-element", model=tiny, data=data)) == 0
    return out


def test_random_elements_train_and_the_others_do_not(elements, tiny, capsys):
    for out in (elements, elements / "checkpoint-4"):
        assert main(["verify", str(out)]) == 0
        assert "28 of 28 tensors bit-identical" in capsys.readouterr().out
    base, ours, masks = tensors(tiny), tensors(out), Masks(out)
    assert masks.keys() == {name for name in base if "proj" in name}
    for name, mask in masks.items():
        frozen = mask.tensor()
        assert frozen.sum() == frozen.numel() // 2
        assert torch.equal(base[name].float()[frozen], ours[name][frozen])
        assert (base[name].float()[~frozen] != ours[name][~frozen]).float().mean() > 0.99
    assert Manifest.load(out).trainable_fraction["layers"] == pytest.approx(0.5, abs=2e-3)  # the norms train whole


def test_verify_finds_a_frozen_scalar_that_moved_and_a_mask_that_was_changed(elements, tmp_path, sft, capsys):
    out = shutil.copytree(elements, tmp_path / "out")
    name, mask = next(iter(Masks(out).items()))
    for where, status in ((mask.tensor(), 1), (~mask.tensor(), 0)):
        content = tensors(out)
        broken = {key: tensor.clone() for key, tensor in content.items()}
        broken[name][tuple(where.nonzero()[0])] += 1
        save_file(broken, out / "model.safetensors", metadata={"format": "pt"})
        assert main(["verify", str(out)]) == status
        save_file(content, out / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    with safe_open(out / "hft_masks.safetensors", "pt") as file:
        metadata = file.metadata()
    bits = load_file(out / "hft_masks.safetensors")
    bits[name][0] ^= 1
    save_file(bits, out / "hft_masks.safetensors", metadata=metadata)
    assert main(["verify", str(out)]) == 2
    assert "is not the one that the manifest was written with" in error_of(capsys)
    # As a base it is refused by the same check.
    assert sft(tmp_path / "next", method="hft", model=out) == 2
    assert "is not the one that the manifest was written with" in error_of(capsys)


def test_partly_frozen_runs_resume_exactly_and_refuse_other_masks_and_states(elements, tmp_path, sft, capsys):
    out, flags = tmp_path / "out", ["--weight_decay", "0.1"]
    manifest = shutil.copytree(elements / "checkpoint-2", out / "checkpoint-2") / "hft_manifest.json"
    assert sft(out, *flags, "--selection_seed", "1", method="random-element") == 2
    assert "other settings (selection_seed 0 there, 1 here)" in error_of(capsys)
    content = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(content) | {"compact": False}))
    assert sft(out, *flags, method="random-element") == 2
    assert "kept there the optimizer's state of whole tensors" in error_of(capsys)
    manifest.write_text(content)
    path, held = manifest.with_name("model.safetensors"), tensors(manifest.parent)
    save_file({f"{name}.old" if "norm" in name else name: held[name] for name in held}, path)
    assert sft(out, *flags, method="random-element") == 2
    assert "model.layers.0.input_layernorm.weight there under another name" in error_of(capsys)
    save_file(held, path)
    assert sft(out, *flags, method="random-element") == 0
    ours, theirs = tensors(out), tensors(elements)
    assert all(identical(ours[name], theirs[name]) for name in theirs)
    assert losses(out / "checkpoint-4") == losses(elements / "checkpoint-4")


def test_a_random_draw_of_scalars_is_the_same_on_any_machine():
    anatomy = anatomy_of(meta_model(config_of("llama")))
    masks = select(anatomy, SelectionConfig(policy="random-element", selection_seed=7)).frozen_masks
    assert masks["model.layers.2.mlp.up_proj.weight"].digest()[:16] == "75d000a8c916a1bd"
    again = select(anatomy, SelectionConfig(policy="random-element", selection_seed=7, round=2)).frozen_masks
    shared = masks["model.layers.2.mlp.up_proj.weight"].tensor() & again["model.layers.2.mlp.up_proj.weight"].tensor()
    assert 0.2 < shared.float().mean() < 0.3


def test_a_base_that_was_written_over_is_found(tiny):
    """Compared with itself it would be identical; the manifest's checksum is of what it was."""
    weights = tensors(tiny)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert verify_tensors(weights, {name: checksum(weights[name])}, [], weights).ok
    found = verify_tensors(weights, {name: checksum(weights[name] + 1)}, [], weights)
    assert found.broken == {name: "the base's tensor is not the one that the manifest was written for"}


def test_a_part_marks_its_boxes_only():
    part = Part("w", (4, 6, 5), (((1, 2), (0, 3)), ((3, 4), (3, 6))))
    mask = torch.zeros(4, 6, 1, dtype=torch.bool)
    part.mark(mask, True)
    assert mask.expand(4, 6, 5).sum() == part.numel == 30
    assert mask[1, :3].all()
    assert mask[3, 3:].all()


def test_frozen_embeddings_leave_the_residual_stream_in_fp32(tiny):
    """What an embedding hands on is the residual stream, whose precision is not to depend on what trains."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    freeze(model, select(anatomy_of(model), SelectionConfig(freeze_embeddings=True)))
    upcast(model, autocast=True)
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        states = model(torch.arange(8)[None], output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.float32}


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "falcon", "gpt2"])
def test_frozen_layer_norms_take_the_residual_stream_in_fp32(family):
    """On a CPU, torch's LayerNorm takes no weight that is narrower than its input."""
    model = small(family).to(torch.bfloat16)
    freeze(model, select(anatomy_of(model), SelectionConfig()))
    upcast(model, autocast=True)
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
