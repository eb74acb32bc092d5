"""Configuration of a linear-attention student (LAWCAT, LoLCATs) for transformers."""

from transformers import PretrainedConfig


class LawcatConfig(PretrainedConfig):
    """``lawcat`` describes the model; the usual fields beside it (hidden_size, ...) repeat it for other tools.

    Its keys: ``model`` (architecture), ``attention`` (what replaces softmax attention), ``lora`` (rank, alpha and
    targets of the adapters, or None), ``rope`` (angle per token of each rotated pair) and ``rope_factor`` (on cosine and
    sine), ``extra`` (where the model comes from).
    """

    model_type = "lawcat"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, lawcat=None, **kwargs):
        self.lawcat = lawcat or {}
        super().__init__(**kwargs)
