"""Hugging Face's Accelerator as a run's arguments say, whatever ``ACCELERATE_…`` variables the shell has."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

# They would shard the model or hand it to another engine.
_OTHER_ENGINES = ("USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "USE_SAGEMAKER")


def plain_accelerator(*, precision: str = "no", cpu: bool = False, **options: Any) -> Accelerator:
    """A new Accelerator: one step of the optimiser a batch, no compilation, replicas of the whole model.

    The environment still says which processes and devices there are. It cannot change gradients: Accelerate
    lets ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS`` overrule its argument, and a loop that does not
    accumulate would divide every gradient by that number.

    Args:
        precision: "no", "bf16" or "fp16".
        cpu: keep off the GPU.
        options: of ``accelerate.Accelerator``.

    Raises:
        ValueError: a variable asks for sharding or for another engine.
    """
    for name in _OTHER_ENGINES:
        if os.environ.get(f"ACCELERATE_{name}", "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"the environment variable ACCELERATE_{name} must not be set: convinit trains whole models, "
                "one on each process. Unset it, or launch without that option (see accelerate config)"
            )
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    return Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        **options,
    )
