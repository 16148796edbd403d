"""What a model scores: perplexity, suites of lm-evaluation-harness."""
