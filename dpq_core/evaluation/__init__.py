"""What a model scores, document by document.

Import from its modules: `scores` (which needs no torch), `perplexity`, `harness` and `suites`
(lm-evaluation-harness).
"""
