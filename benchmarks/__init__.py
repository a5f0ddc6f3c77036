"""Speed of the library beside what people use today. `python -m benchmarks --help`."""
