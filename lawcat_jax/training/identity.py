"""What makes a run this run and no other: its configuration, its teacher and its tokenizer.

The manifest and every checkpoint hold it, so that a run goes on with nothing else than what it began with, also where
one of the two is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lawcat_jax.config import Config, MixtureSource, ModelConfig, to_dict
from lawcat_jax.errors import UserError

# Fields that change neither parameters nor data: a run may be resumed with other values.
HARMLESS = ("workdir", "dry_run", "max_bad_steps", "mesh", "checkpoint", "log", "eval")
# The same in the data of a stage: batches and their order do not depend on them.
HARMLESS_OF_DATA = ("num_workers", "num_processes")

RETURNS_KEPT = "+returns"
"""Ends the digest of a text file whose carriage returns are in the tokens: in those of earlier versions they are not."""


def identity(config: Config, origin: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values ``{"config": ..., "teacher": ..., "data": ...}`` of a run.

    ``origin`` describes what the run starts from: ``model`` (the architecture's fields), ``dtype`` of the frozen
    weights, ``weights``, ``weights_hash`` and ``tokenizer`` (digests; ``weights`` None where they are drawn at random, and
    ``weights_hash`` missing there, and where an earlier version wrote this), and ``chat_template`` (digest) where the data
    are conversations. ``data``: stage ->
    source -> what tells it from a changed one, see :func:`lawcat_jax.training.inputs.data_read`.
    """
    values = {name: value for name, value in to_dict(config).items() if name not in HARMLESS}
    return json.loads(json.dumps({"config": values, "teacher": dict(origin), "data": dict(data)}))


def refuse_another(found: Any, own: Mapping[str, Any], where: str) -> None:
    """Compare the identity ``found`` in a manifest or checkpoint at ``where`` with that of this run.

    Parts that ``found`` lacks (it was written by an earlier version) are not compared. Weights are compared when both
    sides hold them in one number format.

    Raises:
      UserError: naming what differs.
    """
    if not isinstance(found, dict):
        return
    if isinstance(found.get("config"), dict):
        refuse_other_config(found["config"], own["config"], where)
    _refuse_other_data(found.get("data"), own.get("data"), where)
    old, new = found.get("teacher"), own["teacher"]
    if not isinstance(old, dict):
        return
    changed = differences(old.get("model", new["model"]), new["model"], _plain(ModelConfig()), "its config")
    digests = [name for name in ("weights", "weights_hash") if name in old or name == "weights"]
    if old.get("dtype") == new["dtype"] and any(old.get(name) != new.get(name) for name in digests):
        changed.append("its weights have changed")
    if old.get("tokenizer") != new["tokenizer"]:
        changed.append("the tokenizer has changed")
    if "chat_template" in old and old["chat_template"] != new.get("chat_template"):
        changed.append("the tokenizer's chat template has changed")
    if changed:
        raise UserError(
            f"{where} belongs to a run with another teacher ({_listed(changed)}); restore that teacher, or use another "
            "--workdir"
        )


def _refuse_other_data(old: Any, new: Any, where: str) -> None:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    before = {(stage, source): files for stage, sources in old.items() for source, files in sources.items()}
    now = {(stage, source): files for stage, sources in new.items() for source, files in sources.items()}
    changed = [place[1] for place, files in now.items() if not _same_files(before.get(place, files), files)]
    kept = [
        place[1]
        for place, files in now.items()
        if [[*file[:2], str(file[-1]).removesuffix(RETURNS_KEPT)] for file in files] == before.get(place) != files
    ]
    if kept:
        raise UserError(
            f"{where} belongs to a run of an earlier version, which read the carriage returns of {', '.join(dict.fromkeys(kept))} "
            "as line feeds, while this one keeps them; use another --workdir"
        )
    if changed:
        raise UserError(
            f"{where} belongs to a run that began with other data: files or rows of {', '.join(dict.fromkeys(changed))} have "
            "other names or contents now; restore them, or use another --workdir"
        )


def unrecorded(found: Any, own: Mapping[str, Any]) -> list[str]:
    """The sources of the data of a run that ``found``, the identity with which an earlier version began it, does not tell: those
    cannot be compared. [] where it tells of no data at all, as for a run that begins."""
    old = found.get("data") if isinstance(found, dict) else None
    if not isinstance(old, dict):
        return []
    names = [source for stage, sources in own["data"].items() for source in sources if source not in old.get(stage, {})]
    return list(dict.fromkeys(names))


def _same_files(old: list[list[Any]], new: list[list[Any]]) -> bool:
    """Earlier versions recorded names and sizes only."""
    return len(old) == len(new) and all(
        a[:known] == b[:known] for a, b in zip(old, new, strict=True) for known in [min(len(a), len(b))]
    )


def refuse_other_config(old: dict, new: dict, where: str) -> None:
    """Compare two configurations as plain values, without their harmless fields.

    Raises:
      UserError: naming the fields that differ.
    """
    defaults = _plain(Config())
    defaults["teacher"]["architecture"] = _plain(ModelConfig())
    if differing := differences(old, new, defaults, "config"):
        raise UserError(f"{where} holds a run with another configuration ({_listed(differing)}); use another --workdir")


def refuse_other_evaluation(found: Any, config: Config, where: str) -> None:
    """Compare the settings of the evaluation of a finished run (``eval`` of the configuration in its manifest) with those of
    ``config``, where it asks for one: it is not done again.

    Raises:
      UserError: naming the fields that differ.
    """
    if not isinstance(found, dict) or not config.eval.enabled:
        return
    new, defaults = _plain(config.eval), _plain(Config().eval)
    kept = {
        name: value for name, value in new.items() if name not in ("batch_size", "prefill_chunk")
    }  # change no result
    old = {name: value for name, value in found.items() if name in kept}
    if differing := differences(old, kept, defaults, "config.eval"):
        raise UserError(
            f"{where} holds a finished run, evaluated with other settings ({_listed(differing)}); measure it anew with "
            f"python -m lawcat_jax.evaluate --checkpoint={where}"
        )


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


def differences(old: Any, new: Any, defaults: Any, path: str) -> list[str]:
    """One line for each leaf of two trees of plain values that differs. A field that a later version of the program
    brought may be missing in ``old``: that run did what its default says.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        defaults = defaults if isinstance(defaults, dict) else {}
        found = []
        for name in sorted(old.keys() | new.keys()):
            if (path == "config" and name in HARMLESS) or (path.endswith(".data") and name in HARMLESS_OF_DATA):
                continue
            missing = object()
            a, b = old.get(name, missing), new.get(name, missing)
            if a is missing and (not b or b == defaults.get(name, missing)):
                continue
            if a is missing or b is missing:  # a field that one version of the program does not have
                found.append(f"{path}.{name}: only in the {'new' if a is missing else 'old'} configuration")
            else:
                found += differences(a, b, defaults.get(name), f"{path}.{name}")
        return found
    if isinstance(old, list) and isinstance(new, list) and path.endswith(".mixture") and len(old) == len(new):
        defaults, pairs = _plain(MixtureSource()), enumerate(zip(old, new, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, defaults, f"{path}[{index}]")]
    if isinstance(old, bool) and path.endswith(".add_bos") and isinstance(new, str):
        old = "always" if old else "never"  # what these values of an earlier version meant
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]


def _listed(differing: list[str]) -> str:
    return "; ".join(differing[:8]) + ("; ..." if len(differing) > 8 else "")
