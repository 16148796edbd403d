"""An engine that serves a model: started here in an environment of its own (`process`), or a server
that is there; asked over HTTP what it thinks of tokens (`client`).

`transformers_server` and `about` run in the engine's environment and know nothing of this project.
"""
