"""The backends: `registry` selects the backend for a tensor, `operators` calls it."""
