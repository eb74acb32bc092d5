"""Students made of a trained student without training: gates of lower rank, layers given back to softmax attention."""
