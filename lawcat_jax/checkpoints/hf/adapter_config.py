"""``adapter_config.json`` of PEFT: which modules of a model an adapter changes, and by how much.

Every field is neutral, handled, or refused by name. Handled: r, lora_alpha, use_rslora, rank_pattern, alpha_pattern,
target_modules (names, suffixes, a regular expression, "all-linear"), exclude_modules, layers_to_transform,
layers_pattern. Refused: whatever makes the result more than W + scale B A with the W of the base model, in particular
initial values that change the base itself (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lawcat_jax.errors import UserError

_HANDLED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
_HANDLED |= {"layers_to_transform", "layers_pattern", "peft_type", "init_lora_weights"}
# What has no part in the values of a trained adapter: where it is from, how it was trained, how it is kept in memory.
_IGNORED = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_IGNORED |= {"lora_dropout", "runtime_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
_IGNORED |= {"megatron_core", "qalora_group_size", "ensure_weight_tying"}
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # B A = 0, or zero B: the base stays as it is


class AdapterConfig:
    """A checked ``adapter_config.json``.

    Raises:
      UserError: not LoRA, a field that is refused, or one of a wrong type; all of them in one line.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        if values.get("peft_type") != "LORA":
            raise UserError(f"{where}: peft_type {values.get('peft_type')!r} is not supported; supported: 'LORA'")
        # A value that says "not used" is neutral, whatever the field.
        odd = [
            f"{name} {value!r}"
            for name, value in values.items()
            if name not in _HANDLED | _IGNORED
            and value not in (None, False, "", "none")
            and value != []
            and value != {}
        ]
        init = values.get("init_lora_weights", True)
        if init not in _HARMLESS_INITS:
            odd.append(
                f"init_lora_weights {init!r} (it changes the base weights themselves; save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion)"
            )
        if odd:
            raise UserError(f"{where}: not supported: {', '.join(odd)}")
        rank, alpha = values.get("r"), values.get("lora_alpha")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not _number(alpha):
            raise UserError(f"{where}: r {rank!r} and lora_alpha {alpha!r} should be numbers, r at least 1")
        self._check_types()
        self.dropout = float(values.get("lora_dropout") or 0.0)

    def rank(self, module: str) -> int:
        """Rank of a module's adapter; ``module`` as PEFT names it: ``model.layers.0.self_attn.q_proj``."""
        return self._of("rank_pattern", module, self.values["r"])

    def alpha(self, module: str) -> float:
        """What B A is multiplied by, times the rank."""
        alpha = float(self._of("alpha_pattern", module, self.values["lora_alpha"]))
        return alpha * math.sqrt(self.rank(module)) if self.values.get("use_rslora") else alpha

    def targets(self, modules: Collection[str]) -> list[str]:
        """Those of a model's linear ``modules`` that carry an adapter, by PEFT's rules.

        Raises:
          UserError: none does.
        """
        found = [module for module in modules if self._is_target(module)]
        if not found:
            wanted = self.values.get("target_modules")
            raise UserError(f"{self.where}: target_modules {wanted!r} names no module of this model")
        return found

    def _is_target(self, module: str) -> bool:
        excluded, wanted = self.values.get("exclude_modules") or [], self.values["target_modules"]
        if _matches(excluded, module):
            return False
        if wanted == "all-linear":
            return module != "lm_head"
        if isinstance(wanted, str) or module in wanted:
            return _matches(wanted, module)
        return _matches(wanted, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _of(self, field: str, module: str, default: Any) -> Any:
        for pattern, value in (self.values.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _check_types(self) -> None:
        values, problems = self.values, []
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = values.get(name)
            names = [value] if isinstance(value, str) else ([] if value is None else value)
            if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
                problems.append(f"{name} {value!r} should be a name or a list of names")
            elif isinstance(value, str) or name == "layers_pattern":
                problems += [f"{name} {item!r} is not a regular expression" for item in names if not _compiles(item)]
        if not values.get("target_modules"):
            problems.append("target_modules is missing")
        layers = values.get("layers_to_transform")
        if not (layers is None or _whole(layers) or (isinstance(layers, list) and all(map(_whole, layers)))):
            problems.append(f"layers_to_transform {layers!r} should be a layer or a list of layers")
        for name, good in (("rank_pattern", lambda n: _whole(n) and n > 0), ("alpha_pattern", _number)):
            pattern = values.get(name) or {}
            if not isinstance(pattern, dict) or not all(_compiles(key) and good(n) for key, n in pattern.items()):
                problems.append(f"{name} {pattern!r} should map names to numbers")
        if not isinstance(values.get("use_rslora") or False, bool):
            problems.append(f"use_rslora {values['use_rslora']!r} should be true or false")
        if not _number(values.get("lora_dropout") or 0.0):
            problems.append(f"lora_dropout {values['lora_dropout']!r} should be a number")
        if problems:
            raise UserError(f"{self.where}: {'; '.join(problems)}")


def _matches(wanted: str | list[str], module: str) -> bool:
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, module) is not None
    return module in wanted or any(module.endswith(f".{name}") for name in wanted)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
