"""Perplexity by position: how much the text before helps, from the first tokens to the end of a long context."""

from __future__ import annotations

import numpy as np

from lawcat_jax.config import EvalConfig
from lawcat_jax.tasks.ahead import Ahead
from lawcat_jax.tasks.perplexity import Perplexity
from lawcat_jax.tasks.results import Likelihood
from lawcat_jax.tasks.task import Model, Progress


class PositionPerplexity(Perplexity):
    """Perplexity of blocks of ``settings.position_block`` positions, in one pass over sequences of the largest length.

    The pass carries its state from chunk to chunk, so a recurrent model needs no more memory for 128K tokens than for one
    chunk. A row of the table is one block and is named by its end; the last block may be shorter.
    """

    name = "perplexity_by_position"
    heading = "Perplexity by position"
    settings = ("samples", "text", "text_key", "position_block")
    x_label = "position (tokens)"

    def reads(self, settings: EvalConfig) -> set[str]:
        """With ``prefill_chunk``: a sequence is read in chunks."""
        return super().reads(settings) | {"prefill_chunk"}

    def lengths(self, settings: EvalConfig) -> list[int]:
        return [max(settings.lengths)]

    def measure(
        self,
        model: Model,
        length: int,
        settings: EvalConfig,
        progress: Progress | None = None,
        prepared: Ahead | None = None,
    ) -> dict[int, Likelihood]:
        del prepared
        totals, weights, samples = np.zeros(length), np.zeros(length), 0
        for count, batch in self.batches(model, length, settings, progress):
            batch_totals, batch_weights = model.position_nll(batch)
            totals, weights, samples = totals + batch_totals, weights + batch_weights, samples + count
        found = {}
        for start in range(0, length, settings.position_block):
            end = min(start + settings.position_block, length)
            if (weight := weights[start:end].sum()) > 0:
                found[end] = Likelihood(float(totals[start:end].sum() / weight), round(weight), samples)
        return found


TASKS = (PositionPerplexity(),)
