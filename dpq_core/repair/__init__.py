"""Which layers get more bits: what each costs, and the best assignment under a budget.

Import from its modules: `sensitivity`, `allocation` (which needs no torch).
"""
