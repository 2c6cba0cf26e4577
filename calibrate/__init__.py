"""Calibration: learn routers and ratios. Nothing here knows of graphs."""
