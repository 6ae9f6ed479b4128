"""Policies, one file each. A new one is a file here, or an entry point of the group `wmcache.plan_policies`."""

from __future__ import annotations

from collections.abc import Callable

from wmcache.common.registry import Registry
from wmcache.planner.base import Policy
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions

PLAN_POLICIES: Registry[Callable[[EvalContext, PlanOptions], Policy]] = Registry(
    "policy", package="wmcache.planner.policies", group="wmcache.plan_policies"
)
"""Name -> function of a loaded run and options; it raises UserError where the run does not suit the policy."""


def make_policy(context: EvalContext, options: PlanOptions) -> Policy:
    """Create the policy of an evaluation; raises UserError for an unknown one, or where the run does not suit it."""
    return PLAN_POLICIES.get(context.policy(options))(context, options)


__all__ = ["PLAN_POLICIES", "Policy", "make_policy"]
