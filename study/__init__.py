"""A comparison of rules for the objectives' weights: docs/study.md. `python -m study --help`."""
