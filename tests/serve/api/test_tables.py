"""Names that stand in several places are the configuration's."""

from __future__ import annotations

from typing import get_args

import pytest

from loopwise.convert.architectures import SUPPORTED
from loopwise.errors import UserError
from loopwise.exit_rules import ExitRule
from loopwise.model.configuration_recurrent_depth import EXIT_RULES, KV_POLICIES, policy_slots
from loopwise.serve.api.architectures import ARCHITECTURES, NOT_SERVED, vllm_architecture
from loopwise.serve.api.limits import check_policy
from loopwise.serve.engine.exits import RULES
from loopwise.serve.engine.kv import KVPolicy
from tests.helpers.tiny import source_config, with_state


def test_exit_rules():
    assert tuple(RULES) == EXIT_RULES == get_args(ExitRule)


@pytest.mark.parametrize("depths", [1, 4, 9])
@pytest.mark.parametrize("name", [*KV_POLICIES[:4], "modulo-1", "modulo-4"])
def test_kv_policies(name, depths):
    check_policy(name)
    assert KVPolicy(name, depths).slots == policy_slots(name, depths)


@pytest.mark.parametrize("name", ["singel", "modulo-0", "modulo-k", "modulo", "routed", ""])
def test_an_unknown_kv_policy_is_refused_with_the_choices(name):
    with pytest.raises(UserError, match=f"^kv_policy='{name}': choose from per-depth, last-exited, single, first, "):
        check_policy(name)


def test_a_source_is_served_or_has_the_reason_that_fits():
    assert sorted([*ARCHITECTURES, *NOT_SERVED]) == sorted([*SUPPORTED, "sandwich", "ungated"])
    for reason, names in {
        "keep a state": with_state(),
        "keeps latents": [name for name in SUPPORTED if getattr(source_config(name), "kv_lora_rank", None)],
    }.items():
        own = {name for name, why in NOT_SERVED.items() if reason in why}
        assert own
        assert own <= {*names}
        assert not {*names} & {*ARCHITECTURES}
    with pytest.raises(
        UserError, match=r"'lfm2' cannot be served \(its layers keep a state, .*\): choose from arcee, "
    ):
        vllm_architecture("lfm2")
