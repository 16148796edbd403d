"""What a model scores, document by document, and how far two models' predictions are apart.

`suites` of lm-evaluation-harness and perplexity's windows become `requests`: a `forest` of shared
prefixes, cut into chunks (`chunk_files` on disk). A `walk` takes chunks through a `subject` block
by block, in `packs` (`attention`, proven for an architecture by `sharing`), as many at a time as
there is `room` for; the `head` turns the last hidden states into log-likelihoods, `scorer` into
answers, `results` into `scores` (which need no torch). `divergence` compares two models' states.
`perplexity` is the definition in plain torch.
"""
