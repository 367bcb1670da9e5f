"""Ground floor (L0): configs, YAML, checkpoints, processes, files, devices. Knows nothing of images or networks."""
