# SPDX-License-Identifier: Apache-2.0
"""TRL's configs with `lowprec=`: `SFTTrainer(args=LowPrecSFTConfig(..., lowprec="fp8-lm"))`.

Nothing else is needed. TRL's trainers are Trainers, and the reference models of DPO, GRPO and their kin pass through
`Accelerator.prepare_model`, where they get the policy's precision. Plain TRL configs work too, under
`accelerate launch --mixed_precision fp8-lm` or with LowPrecCallback.
"""

from dataclasses import dataclass

try:
    from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig
except ImportError as error:
    raise ImportError(f"LowPrec<...>Config of TRL needs trl: pip install 'hf-lowprec[trl]' ({error})") from error

from hf_lowprec.integrations.trainer import LowPrecArguments


@dataclass
class LowPrecSFTConfig(LowPrecArguments, SFTConfig):
    """trl.SFTConfig with `lowprec=`."""


@dataclass
class LowPrecDPOConfig(LowPrecArguments, DPOConfig):
    """trl.DPOConfig with `lowprec=`. The reference model is converted like the policy: the first loss is ln 2."""


@dataclass
class LowPrecRewardConfig(LowPrecArguments, RewardConfig):
    """trl.RewardConfig with `lowprec=`. The `score` head keeps its precision."""


@dataclass
class LowPrecGRPOConfig(LowPrecArguments, GRPOConfig):
    """trl.GRPOConfig with `lowprec=`. Reward models keep their precision."""
