"""What the native modules share."""

from __future__ import annotations


class NoMemory(ValueError):
    """A tensor has elements and no memory of its own: a wrapper, freed storage, or a tensor of zeros."""
