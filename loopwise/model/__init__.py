"""The recurrent-depth model, registered with transformers' Auto classes.

The files here are flat and import only torch, transformers and each other: they travel with every saved checkpoint, so
that it loads with `trust_remote_code=True` where loopwise is not installed. In reading order, each importing only those
above it:

    configuration_fields.py             kinds of the config's fields
    configuration_router.py             the fields of a router
    configuration_sandwich.py           config of the sandwich architecture
    configuration_source.py             the source's config inside ours
    configuration_recurrent_depth.py    the config
    modeling_sandwich.py                the sandwich architecture, which transformers lacks
    initial_state.py                    s_0, and its counter-based noise
    injection.py                        the input e enters each recurrence
    recurrence_encoding.py              encoding of position and recurrence
    halting.py                          adaptive computation time
    relaxation.py                       LoRA and parameters of each depth
    source_layers.py                    taps in the source's layer list, and views of the cache
    routed_rows.py                      the tokens of a routed recurrence
    router.py                           routers of Mixture-of-Recursions
    experts.py                          router logits of a mixture of experts
    call.py                             one forward call, its options and results
    output.py                           the output of a call
    recurrence.py                       the recurrence
    modeling_recurrent_depth.py         the model
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
