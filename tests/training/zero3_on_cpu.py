"""DeepSpeed's ZeRO-3 on CPU processes: torchrun zero3_on_cpu.py WORDS OF hft.

What `accelerate launch` with hft/accelerate/zero3.yaml sets up, with gloo alone: DeepSpeed's own op for shared
memory would first be compiled. accelerate knows DeepSpeed on GPUs only, so this names the backend; the words need
`--use_cpu false`.
"""

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(Path(__file__).parents[2] / "hft/accelerate/zero3.json")

import deepspeed
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hft.cli import main

if __name__ == "__main__":
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(main(sys.argv[1:]))
