"""A checkpoint's model as blocks: where its parts are, and which linears read the same input; found
in the model itself and proven on a small instance of it."""
