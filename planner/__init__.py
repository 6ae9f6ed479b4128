"""Policies, solvers and objectives: runs episodes, judges them and reports."""
