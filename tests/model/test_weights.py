import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft.errors import HFTError
from hft.model.weights import Weights, as_bytes, checksum, local_folder, widest
from hft.record.verification import verify_tensors


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
    with pytest.raises(HFTError, match="not a complete weights file"):
        Weights(tmp_path)


def test_the_widest_dtype_holds_all():
    assert widest([torch.bfloat16, torch.bfloat16]) == torch.bfloat16
    assert widest([torch.float16, torch.bfloat16]) == torch.float32


def test_a_truncated_or_missing_file_is_told_in_a_sentence(tiny, tmp_path):
    with pytest.raises(HFTError, match="not a complete weights file"):
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
