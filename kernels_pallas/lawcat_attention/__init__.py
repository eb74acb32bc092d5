"""LAWCAT attention from raw projections: convolutions, feature map, gate and gated linear attention in one
operation."""
