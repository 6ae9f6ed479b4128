"""Model predictive control: see `planner.mpc`."""

from __future__ import annotations

from wmcache.planner.mpc import MpcPolicy
from wmcache.planner.policies import PLAN_POLICIES

PLAN_POLICIES.register("mpc")(MpcPolicy)
