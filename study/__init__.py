"""Does PAMA align, and whose weights should it use? `python -m study --help`."""
