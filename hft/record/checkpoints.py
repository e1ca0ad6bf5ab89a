"""The checkpoints of a run, and which of them it can resume from."""

import json
import re
import zipfile
from pathlib import Path

from hft.record.manifest import MANIFEST_NAME, Manifest

# As Trainer names them; transformers.trainer_utils has the constants, and importing it loads peft.
CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINER_STATE, RNG_STATE = "trainer_state.json", "rng_state_{}.pth"


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, complete or not."""
    found = [path for path in Path(folder).glob("*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def is_checkpoint(folder: Path, out: str | Path) -> bool:
    return folder.parent == Path(out) and CHECKPOINT.fullmatch(folder.name) is not None


def last_checkpoint(folder: str | Path) -> str | None:
    """The last complete checkpoint in a folder, or None; one without the trainer's state, the last file, is cut off."""
    for checkpoint in reversed(checkpoints(folder)):
        if not (checkpoint / MANIFEST_NAME).exists():
            continue
        try:
            json.loads((checkpoint / TRAINER_STATE).read_text())
        except (FileNotFoundError, ValueError):
            continue
        processes = Manifest.load(checkpoint).processes
        states = [checkpoint / RNG_STATE.format(rank) for rank in range(processes if processes > 1 else 0)]
        # The first process does not wait for the others' states, zip archives; weights alone have none.
        if not any(path.exists() for path in states) or all(map(zipfile.is_zipfile, states)):
            return str(checkpoint)
    return None
