"""Files that an exported student carries with it: plain torch, which nothing here imports."""
