"""Statistics of the layers' inputs, summed over samples in a fixed order whoever sums.

Import from its modules: `statistics` (a block's), `reduction_tree` (the order), `required_tokens`.
"""
