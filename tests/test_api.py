"""`import hft`: light to import, and enough for a training loop of one's own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hft
from hft.errors import HFTError
from hft.freezing import freeze as set_requires_grad


def loops() -> list[str]:
    return re.findall(r"```python\n(.*?)```", Path("docs/your-own-loop.md").read_text(), flags=re.S)


@pytest.mark.parametrize("index", [0, 1], ids=["torch", "accelerate"])
def test_the_documented_loops_run_and_prove_what_they_froze(tiny, rows, index, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    batches = [
        tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"]
        for row in rows[:3]
    ]
    scope = {"BASE": str(tiny), "batches": batches}
    exec(loops()[index], scope)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    trained = hft.select(hft.anatomy_of(scope["model"])).trained_parameters
    moved = {name for name, p in scope["model"].named_parameters() if not torch.equal(p, base[name])}
    assert moved == set(scope["frozen"].selection.trained_parameters)
    if index == 0:
        assert moved == set(trained)
        assert "18 of 18 tensors bit-identical" in capsys.readouterr().out
    name = scope["frozen"].selection.frozen_parameters[0]
    with torch.no_grad():
        dict(scope["model"].named_parameters())[name].view(-1)[0] += 1
    assert not hft.verify(scope["model"], scope["frozen"]).ok


def test_what_was_added_or_untied_since_the_freeze_is_unlisted(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight = model.model.embed_tokens.weight
    frozen = hft.freeze(model, hft.select(model))
    assert hft.verify(model, frozen).ok
    assert hft.verify(model.state_dict(), frozen).ok
    state = model.state_dict()
    del state["model.norm.weight"]
    assert hft.verify(state, frozen).lost == ["model.norm.weight"]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    for out in (model, model.state_dict()):
        assert hft.verify(out, frozen).unlisted == ["lm_head.weight", "model.extra"]


@pytest.mark.parametrize("policy", ["category", "random-element"])
def test_what_a_wider_dtype_moved_is_not_rounded_away(tiny, policy):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    frozen = hft.freeze(model, hft.select(model, policy=policy))
    assert hft.verify(model.float(), frozen).ok
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key, mask in frozen.selection.frozen_masks.items():
        state[key][~mask.tensor()] *= 1.001
    assert hft.verify(state, frozen).ok
    state[name := next(iter(frozen.checksums))] *= 1.001
    assert list(hft.verify(state, frozen).broken) == [name]


def test_freezing_clears_the_gradients_of_before(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), torch.arange(12)[None]
    for policy in ("category", "random-element"):
        model(input_ids=ids, labels=ids).loss.backward()
        frozen = hft.freeze(model, hft.select(model, policy=policy))
        optimizer.step()
        assert hft.verify(model, frozen).ok, policy
        assert model.lm_head.weight.grad is not None


WRAPPED = """
import os, sys, torch, hft
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import AutoModelForCausalLM

dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
accelerator = Accelerator(cpu=True, dynamo_backend="eager")
for wrap in (torch.compile, DDP, lambda m: DDP(torch.compile(m)), lambda m: torch.compile(DDP(m)), accelerator.prepare):
    wrapped = wrap(model.requires_grad_(True))
    frozen = hft.freeze(wrapped, hft.select(wrapped))
    assert all(hft.verify(out, frozen).ok for out in (wrapped, wrapped.state_dict(), model))
    with torch.no_grad():
        model.get_parameter(frozen.selection.frozen_parameters[0]).view(-1)[0] += 1
    assert not any(hft.verify(out, frozen).ok for out in (wrapped, wrapped.state_dict()))
try:
    hft.freeze(DDP(model.requires_grad_(True)), hft.select(model, policy="random-element"))
except hft.HFTError as error:
    assert "freeze the model first, then wrap it" in str(error)
else:
    raise AssertionError("parts of a wrapped model")
os._exit(0)  # Python's own end may wait forever for a thread of gloo that needs the GIL
"""


def test_wrapped_models_are_selected_frozen_and_verified_under_their_own_names(tiny):
    subprocess.run([sys.executable, "-c", WRAPPED, str(tiny)], check=True)


def test_parts_of_tensors_stay_in_a_loop_over_two_rounds(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    names, ids = model.state_dict().keys(), torch.arange(12)[None]
    for number in (1, 2):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        frozen = hft.freeze(model, hft.select(model, policy="random-element", round=number))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert hft.verify(model, frozen).ok
        assert hft.verify(model.state_dict(), frozen).ok
        state, masks = model.state_dict(), frozen.selection.frozen_masks
        assert state.keys() == names
        assert all(
            ((state[name] != before[name]) == ~mask.tensor()).float().mean() > 0.99 for name, mask in masks.items()
        )
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in names)
    name, mask = next(iter(masks.items()))
    with torch.no_grad():
        model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original0[mask.tensor()] += 1
    assert not hft.verify(model, frozen).ok


def test_a_model_in_memory_is_verified_only_with_what_freeze_returned(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(HFTError, match=r"give what hft\.freeze returned"):
        hft.verify(model)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hft.nothing


def test_a_parameter_outside_the_selection_is_refused_by_name(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    selection = hft.select(model)
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(HFTError, match="extra would be neither frozen nor trained"):
        set_requires_grad(model, selection)


def test_importing_hft_loads_no_torch():
    code = "import sys, hft; assert not {'torch', 'transformers', 'trl'} & sys.modules.keys(); print(len(dir(hft)))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) > 10


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("hft.reporting.paper", {"torch", "transformers", "trl", "datasets", "matplotlib", "jinja2"}),
        ("hft.record.verification", {"trl", "datasets", "matplotlib", "peft"}),
        ("hft.merging.reset, hft.merging.merge, hft.merging.diff", {"trl", "datasets", "matplotlib"}),
    ],
)
def test_commands_that_do_not_train_import_no_trainer(modules, absent):
    code = f"import sys, {modules}; print(*sorted({absent!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_public_names_are_typed(tmp_path):
    right = ["import hft", *(f"hft.{name}" for name in hft.__all__), "hft.SelectionConfig(fraction=0.5)"]
    wrong = ["import hft", "hft.SelectionConfig(nonsense=3)", "hft.nothing"]
    files = [tmp_path / "right.py", tmp_path / "wrong.py"]
    for file, lines in zip(files, (right, wrong), strict=True):
        file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache")]
    found = subprocess.run([*command, *files], capture_output=True, text=True, check=False).stdout
    assert "right.py" not in found
    assert 'wrong.py:2: error: Unexpected keyword argument "nonsense"' in found
    assert 'wrong.py:3: error: Module has no attribute "nothing"' in found
    assert found.endswith("Found 2 errors in 1 file (checked 2 source files)\n")


def test_a_module_of_torch_alone_is_refused():
    with pytest.raises(hft.HFTError, match="only a transformers model can be divided; give the one inside Sequential"):
        hft.select(nn.Sequential(nn.Linear(2, 2)))
