"""Inference: from pictures and streams to detections, and the forms in which these are put down."""
