"""Whether an engine computes what was judged: its log-likelihoods beside ours, and a statement.

`agreement` compares what an engine said of tokens with our own arithmetic on the same tokens;
`statement` says it as an in-toto Statement about the export's files; `envelope` signs that.
"""
