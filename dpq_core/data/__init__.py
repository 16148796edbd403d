"""Texts, images and the suites' data: named by a recipe, read, cut into windows.

Import from its modules: `texts`, `images`, `mirror` (which needs no torch).
"""
