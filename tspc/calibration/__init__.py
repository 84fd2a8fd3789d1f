"""Calibration images, and the statistics of every layer's inputs."""

from tspc.calibration.samples import Calibration, Samples

__all__ = ["Calibration", "Samples"]
