"""Policies, one file each. A new one is a file here, or an entry point of the group `wmcache.plan_policies`."""

from __future__ import annotations

from collections.abc import Callable

from wmcache.common.errors import UserError
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
    policy = PLAN_POLICIES.get(context.policy(options))(context, options)
    if context.by_return and getattr(policy, "needs_goal", True):
        raise UserError(
            f"--policy {context.policy(options)} needs a goal, and {context.env.spec.id} has none; choose another"
        )
    if options.draw and not getattr(policy, "draws", False):
        raise UserError(f"--draw: policy {context.policy(options)} draws no actions; leave it out")
    return policy


__all__ = ["PLAN_POLICIES", "Policy", "make_policy"]
