"""Operations on sequences sharded over a mesh axis."""
