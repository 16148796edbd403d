"""The second source: classifiers in INT8, after training or by it, on the rails of the first.

Import from its modules: a recipe (`recipe`) is read without torch.
"""
