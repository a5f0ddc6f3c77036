"""The backends: `registry` says which one serves a tensor, `operators` how it is called."""
