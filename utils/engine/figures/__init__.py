"""Figures and pictures: boxes on images, curves, matrices."""
