"""LAWCAT attention from raw projections: convolutions, feature map, gates and gated linear attention in one op."""
