"""What in a run's folder can be resumed, looked at without training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.training_args import OptimizerNames

from hft.errors import HFTError
from hft.record.manifest import Manifest
from hft.runs.folder import check_complete


@pytest.fixture
def zero3(tmp_path, finished) -> Path:
    """What is looked at in a checkpoint that two processes saved under ZeRO-3."""
    replace(Manifest.load(finished), processes=2).save(tmp_path)
    (tmp_path / "global_step2").mkdir()
    for rank in range(2):
        (tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "scheduler.pt").touch()
    return tmp_path


def here(processes: int, **changes) -> SimpleNamespace:
    """As much as is looked at of the config of a run under ZeRO-3."""
    settings = {"optim": OptimizerNames.ADAMW_TORCH_FUSED, "load_best_model_at_end": False}
    return SimpleNamespace(deepspeed="zero3.json", fsdp=None, world_size=processes, **settings | changes)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_checkpoint_of_zero3_goes_with_any_number_of_processes(zero3, processes):
    check_complete(zero3, here(processes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optim": OptimizerNames.SGD}, "not that of sgd; launch 2"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end .*; launch 2"),
    ],
)
def test_what_deepspeed_does_not_convert_needs_as_many_processes_as_before(zero3, changes, why):
    check_complete(zero3, here(2, **changes))
    with pytest.raises(HFTError, match=why):
        check_complete(zero3, here(1, **changes))


def test_a_checkpoint_of_zero3_without_the_parts_of_another_node_is_refused(zero3):
    next(zero3.glob("*/*_rank_1_*")).unlink()
    for processes in (2, 3):
        with pytest.raises(HFTError, match="2 processes saved it, and the parts of 1 are here"):
            check_complete(zero3, here(processes))
