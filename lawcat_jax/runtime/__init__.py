"""What processes and devices are: ``jax.distributed``, the mesh, and facts about chips."""
