"""Plots of measurements, and pictures of what methods do to the patches of an image."""
