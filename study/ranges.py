"""The worst and the best mean of each reward of the parts with language models, fixed before the runs: gains
and balance are in units of (high - low)."""

from __future__ import annotations

LOW = {"pretrained": (-0.2, -0.4, 0.0), "sentiment_length": (-1.0, 0.5)}
HIGH = {"pretrained": (0.6, 0.4, 1.0), "sentiment_length": (1.0, 1.5)}
for _ends in (LOW, HIGH):
    _ends["pretrained_gpu"] = _ends["pretrained"]
