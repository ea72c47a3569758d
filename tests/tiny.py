"""The small MAKE of the benchmarks, as tests call it."""

from benchmarks.thin import TEXT_ENCODER, thin_make, thin_release

tiny_make, tiny_release = thin_make, thin_release

__all__ = ["TEXT_ENCODER", "tiny_make", "tiny_release"]
