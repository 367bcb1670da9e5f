"""Everything below the four verbs and the networks: core, ops, data and engine, in the order of the layer rule."""
