"""Quantized folders in serving engines."""
