"""What a model scores, document by document.

Import from its modules: `scores` (which needs no torch), `perplexity`, `harness` and `suites`
(lm-evaluation-harness); and the scorer that takes their place when it is wired in: `requests` as a
`forest` of shared prefixes, cut into `segments`, which a `walk` takes through a `subject` block by
block (`attention`, `sharing`, `head`); `divergence` of two such walks.
"""
