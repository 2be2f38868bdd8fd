"""Names that stand in several places are the configuration's."""

from __future__ import annotations

from typing import get_args

import pytest

from loopwise.errors import UserError
from loopwise.exit_rules import ExitRule
from loopwise.model.configuration_recurrent_depth import EXIT_RULES, KV_POLICIES, policy_slots
from loopwise.serve.api.limits import check_policy
from loopwise.serve.engine.exits import RULES
from loopwise.serve.engine.kv import KVPolicy


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
