import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainingArguments

from hft.cli import main
from hft.errors import HFTError
from hft.model.anatomy import meta_model
from hft.model.load import load_base, read_config
from hft.model.weights import Weights, as_bytes, checksum, dtypes_of, local_folder, widest
from hft.record.verification import verify_tensors
from tests.conftest import command
from tests.model.test_architectures import small


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def test_tensors_are_read_by_name(tiny):
    weights, tensors = Weights(tiny), load_file(tiny / "model.safetensors")
    assert set(weights) == set(tensors)
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    assert set(weights.dtypes().values()) == {torch.bfloat16}


def test_a_bin_file_is_read_as_well(tiny, tmp_path):
    theirs = Weights(tiny)
    torch.save(dict(theirs), tmp_path / "pytorch_model.bin")
    ours = Weights(tmp_path)
    assert ours.dtypes() == theirs.dtypes()
    assert all(torch.equal(as_bytes(ours[name]), as_bytes(theirs[name])) for name in theirs)
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:-1000])
    with pytest.raises(HFTError, match="is incomplete"):
        Weights(tmp_path)


def test_the_widest_dtype_holds_all():
    assert widest([torch.bfloat16, torch.bfloat16]) == torch.bfloat16
    assert widest([torch.float16, torch.bfloat16]) == torch.float32


BIAS, NORM = "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.input_layernorm.weight"
FUSED, EXPERT = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def mixed(request, tmp_path_factory, tiny):
    """A mixture of experts in bf16 with a router bias and a norm in fp32, as released models have them."""
    folder = tmp_path_factory.mktemp("mixed") / request.param
    small(request.param).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    content = load_file(folder / "model.safetensors")
    content |= {BIAS: torch.tensor([0.1, 0.2, 0.3, 0.4]), NORM: content[NORM].float() + 1e-4}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_each_tensor_is_loaded_in_the_dtype_it_is_stored_in(mixed, tmp_path):
    content = load_file(mixed / "model.safetensors")
    model, stored = load_base(str(mixed), TrainingArguments(str(tmp_path), use_cpu=True))
    assert {name for name, dtype in stored.items() if dtype != torch.bfloat16} == {BIAS, NORM}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stored[name] or "e_score" in name  # which transformers always holds in fp32
        assert name not in content or torch.equal(tensor.to(stored[name]), content[name])
    for dtype, fused in ((torch.float16, torch.float32), (torch.float8_e4m3fn, None)):
        save_file(content | {EXPERT: content[EXPERT].to(dtype)}, tmp_path / "model.safetensors")
        if fused:
            assert dtypes_of(meta_model(read_config("mixed", mixed)), Weights(tmp_path))[FUSED] == fused
            continue
        with pytest.raises(
            HFTError, match=r"up_proj\.weight is stored in torch\.float8_e4m3fn; give the model in bf16"
        ):
            dtypes_of(meta_model(read_config("mixed", mixed)), Weights(tmp_path))


@pytest.mark.parametrize("method", ["hft", "lora"])
def test_each_tensor_trains_and_is_saved_in_the_dtype_it_is_stored_in(mixed, data, tmp_path, method):
    few = ["--max_steps", "1", "--max_length", "64", "--save_strategy", "no", "--bf16", "true"]
    few += ["--global_batch_size", "2", "--per_device_train_batch_size", "2"]
    assert main(command("sft", tmp_path / "out", *few, method=method, model=mixed, data=data)) == 0
    if method != "lora":
        before, after = Weights(mixed), Weights(tmp_path / "out")
        assert after.dtypes() == before.dtypes()
        assert torch.equal(before[BIAS], after[BIAS])


def test_a_truncated_or_missing_file_is_told_in_a_sentence(tiny, tmp_path):
    with pytest.raises(HFTError, match="is incomplete"):
        Weights(truncated(copied(tiny, tmp_path)))
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(HFTError, match=r"model-00001-of-00002\.safetensors"):
        Weights(tmp_path)
    for index in ('{"weight_map": {"a"', '{"metadata": {}}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(HFTError, match="is not a valid index of weights"):
            Weights(tmp_path)
    with pytest.raises(HFTError, match="holds no weights"):
        Weights(tmp_path.parent)
    with pytest.raises(HFTError, match=r"folder .* not found"):
        local_folder(tmp_path / "nowhere")
    for name in ("runs/x", "./x", "models/x", "some/where/else"):
        with pytest.raises(HFTError, match=f"^folder {name} not found$"):
            local_folder(name)
    with pytest.raises(HFTError, match="neither a folder nor found on the Hub"):
        local_folder("some/where")


def test_bits_are_compared_not_values():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert checksum(zero) != checksum(-zero)
    assert checksum(nan) == checksum(nan.clone())
    assert checksum(zero) != checksum(zero.half())
    assert checksum(torch.zeros(2, 3)) != checksum(torch.zeros(3, 2))


def test_verify_tells_every_kind_of_difference(tmp_path):
    names = ("same", "moved", "flipped", "recast", "gone", "stuck", "lost")
    base = {name: torch.arange(4.0) for name in names}
    out = {name: tensor.clone() for name, tensor in base.items() if name not in ("gone", "lost")}
    out["moved"] += 1
    out["flipped"][0] = -0.0
    out["recast"] = out["recast"].half()
    for folder, tensors in (("base", base), ("out", out)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    frozen = {name: checksum(base[name]) for name in ("same", "flipped", "recast", "gone")}
    trained = ("moved", "stuck", "lost")

    result = verify_tensors(Weights(tmp_path / "out"), frozen, trained, Weights(tmp_path / "base"))
    assert not result.ok
    assert result.identical == ["same"]
    assert set(result.broken) == {"flipped", "recast", "gone"}
    assert result.lost == ["lost"]
    assert "frozen:  1 of 4 tensors bit-identical" in result.report()
    assert (result.changed, result.unchanged) == (["moved"], ["stuck"])
    assert "verify FAILED: 4 tensors differ, are missing or are not listed" in result.report()

    alone = verify_tensors(Weights(tmp_path / "out"), frozen, trained, base=None)
    assert set(alone.broken) == {"flipped", "recast", "gone"}
    assert alone.lost == ["lost"]
    assert alone.changed == alone.unchanged == []
