"""The recipes of ``configs/``: trained one by one, as a whole zoo and as the paper's tables; they need a checkout."""
