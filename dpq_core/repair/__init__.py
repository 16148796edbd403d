"""Which layers get more bits: what each costs, and the best assignment under a budget."""
