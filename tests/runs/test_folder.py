"""What in a run's folder can be resumed, looked at without training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def here(processes: int) -> SimpleNamespace:
    """As much as is looked at of the config of a run under ZeRO-3."""
    return SimpleNamespace(deepspeed="zero3.json", fsdp=None, world_size=processes)


def test_a_checkpoint_of_zero3_goes_with_as_many_processes_as_saved_it(zero3):
    check_complete(zero3, here(2))
    for processes in (1, 3):
        with pytest.raises(HFTError, match=f"2 saved it, the parts of 2 are here, and this run has {processes}"):
            check_complete(zero3, here(processes))


def test_a_checkpoint_of_zero3_without_the_parts_of_another_node_is_refused(zero3):
    next(zero3.glob("*/*_rank_1_*")).unlink()
    with pytest.raises(HFTError, match="2 saved it, the parts of 1 are here, and this run has 2"):
        check_complete(zero3, here(2))
