"""What the layers see: calibration inputs and their statistics."""

from tspc.calibration.samples import Calibration, Samples

__all__ = ["Calibration", "Samples"]
