"""How fast a model is: its formats timed side by side, beside what the device could reach.

Import from its modules: `throughput`, `formats_timed`, `roofline`.
"""
