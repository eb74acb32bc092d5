"""A study: many students of one teacher, trained, evaluated and compared as one resumable table of runs.

``python -m lawcat_jax.study --config=configs/study_smollm2.py``. A study's file says what is compared
(:class:`Study`); the rest follows from it:

    table    what a study file is written in: rows, evaluations, claims
    plan     the commands that the table asks for, what they share and what waits for what
    execute  commands side by side on the devices of one machine
    ledger   what was run, with which code, on which device, for how long
    results  numbers of finished evaluations, pooled over seeds, and a verdict on each claim
    report   the same as Markdown and pictures
    run      all of these, one after the other
"""

from lawcat_jax.analysis.study.table import Cells, Claim, Evaluation, Row, Study

__all__ = ["Cells", "Claim", "Evaluation", "Row", "Study"]
