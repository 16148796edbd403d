"""Texts, images and the suites' data: named by a recipe, read, cut into windows."""
