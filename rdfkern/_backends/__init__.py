"""Choice of implementation and the checks that every operation shares (private)."""
