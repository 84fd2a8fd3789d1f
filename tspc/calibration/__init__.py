"""What the layers see: calibration inputs and their statistics."""
