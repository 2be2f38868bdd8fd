"""The recurrent-depth model, registered with transformers' Auto classes.

The files beside this one are flat and import only torch, transformers and each other: they travel with every saved
checkpoint, so that it loads with `trust_remote_code=True` where loopwise is not installed.

    configuration_fields.py           format version and types of the config's fields
    configuration_sandwich.py         config of the source architecture of Huginn and Ouro
    configuration_ungated.py          config of the source architecture of Parcae and LoopFormer
    configuration_source.py           the source's config inside ours
    configuration_router.py           fields of a Mixture-of-Recursions router
    configuration_recurrent_depth.py  the config: layers that recur, and all that is between two recurrences
    modeling_sandwich.py              model of the source architecture of Huginn and Ouro
    modeling_ungated.py               model of the source architecture of Parcae and LoopFormer
    modeling_source.py                the model class of a source's config
    source_layers.py                  the source's layers, run one by one with their masks and cache slots
    some_logits.py                    logits at some positions only
    experts.py                        router logits and load-balancing loss of a mixture of experts
    initial_state.py                  s_0 and its counter-based noise
    injection.py                      the prelude's output, injected into each recurrence
    ends.py                           the norm of that output, and the map of the last state
    recurrence_encoding.py            position and depth, added before each recurrence
    damping.py                        the share of its step that a recurrence makes
    exit_gate.py                      the probability to exit after a recurrence
    recurrence_norm.py                the norm before, after, or at the end of the recurrences
    halting.py                        adaptive computation time
    relaxation.py                     LoRA, norms and biases of each depth
    routed_rows.py                    a layer that runs some of the tokens
    time_conditioning.py              factors by recurrence and R
    router.py                         the router: the choice of the tokens of each recurrence
    output.py                         the output of a call
    call.py                           the state of one call
    recurrence.py                     the loop over recurrences
    modeling_recurrent_depth.py       the model
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
