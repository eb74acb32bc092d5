"""What the mixers of a trained student do: half-lives, gate rank, denominators, errors by layer, states of long texts."""
