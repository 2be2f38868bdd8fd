"""The recurrent-depth model, registered with transformers' Auto classes.

The files beside this one are flat and import only torch, transformers and each other: they travel with every saved
checkpoint, so that it loads with `trust_remote_code=True` where loopwise is not installed.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_recurrent_depth import RecurrentDepthConfig
from .modeling_recurrent_depth import RecurrentDepthForCausalLM
from .output import RecurrentDepthOutput

RecurrentDepthConfig.register_for_auto_class()
RecurrentDepthForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register("recurrent_depth", RecurrentDepthConfig)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM)

__all__ = ["RecurrentDepthConfig", "RecurrentDepthForCausalLM", "RecurrentDepthOutput"]
