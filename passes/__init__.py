"""Passes: look at a model's graphs, find and prove its blocks, and change the model. Nothing here knows of training."""
