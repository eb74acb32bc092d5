"""Evaluation tasks, one file each, and what runs them and reports on them.

A task (see :class:`lawcat_jax.tasks.task.Task`) is found by the registry as soon as its file lies in this folder; its
name is also an option of ``config.eval.tasks``. Runner, report and command line know no task by name.
"""
