"""Pure tensor and array functions (L1): boxes, letterbox, NMS, anchors, assignment, losses, metrics. No I/O."""
